"""The cells that the tests check: four in every run, of every plan and many families in the slow one."""

_BY_PLAN = {
    "ulysses": ("stable_audio", "dit", "sd15", "sd3_inpaint"),
    "ring": ("flux_true_cfg", "cogview3", "kandinsky22_prior"),
    "tensor": ("wuerstchen_prior", "sd3", "auraflow"),
    "cfg": ("sd3", "mochi", "sd15_pag"),
    "data": ("sd3_prompted", "sana", "sdxl_inpaint"),
    "pipefusion": ("sana", "dit", "sd3_img2img"),
    "distrifusion": ("ddim", "dit", "prx"),
    "vae": ("lumina", "sd3"),
}

EXACT: tuple[tuple[str, str], ...] = tuple((case, plan) for plan, cases in _BY_PLAN.items() for case in cases)
"""Pairs of a case and a plan that must be exact."""

QUICK = tuple((_BY_PLAN[plan][0], plan) for plan in ("ulysses", "cfg", "pipefusion", "vae"))
"""Those of them that every run checks."""

REFUSED = (("sdxl", "pipefusion"), ("flux_kontext", "cfg"))
"""Pairs that may be refused, or have nothing to split."""
