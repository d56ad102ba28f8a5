"""The cells that every run of the tests checks: quick ones, of every plan and many families."""

QUICK: tuple[tuple[str, str], ...] = (("flux", "ulysses"),)
