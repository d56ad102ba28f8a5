"""The cells that every run of the tests checks, two minutes of them: quick ones, of every plan and many families."""

_BY_PLAN = {
    "ulysses": ("dit", "sd15", "sd3_inpaint", "stable_audio"),
    "ring": ("flux_true_cfg", "cogview3", "kandinsky22_prior"),
    "tensor": ("sd3", "auraflow", "wuerstchen_prior"),
    "cfg": ("sd3", "mochi", "sd15_pag"),
    "data": ("sana", "sd3_prompted", "sdxl_inpaint"),
    "pipefusion": ("dit", "sana", "sd3_img2img"),
    "distrifusion": ("dit", "prx", "ddim"),
    "vae": ("sd3", "lumina"),
}

EXACT: tuple[tuple[str, str], ...] = tuple((case, plan) for plan, cases in _BY_PLAN.items() for case in cases)
"""Pairs of a case and a plan that must be exact."""

REFUSED = (("sdxl", "pipefusion"), ("flux_kontext", "cfg"))
"""Pairs that may be refused, or have nothing to split."""
