"""NAG against Nesterov's scheme and by hand."""

from __future__ import annotations

from tests.support.trajectory import Array, assert_follows, one_step, zeros_at_first

LR, MOMENTUM, WD = 0.1, 0.9, 0.05


# (kernel file, text that occurs once in it, {what is wrong: the text instead}), for tests/mutations.py
MUTATIONS: list[tuple[str, str, dict[str, str]]] = [
    (
        "nag.py",
        "momentum = s.momentum * momentum - s.lr * g",
        {
            "momentum never fades": "momentum = momentum - s.lr * g",
            "sign": "momentum = s.momentum * momentum + s.lr * g",
            "no learning rate": "momentum = s.momentum * momentum - g",
        },
    ),
    (
        "nag.py",
        "w + (s.momentum * momentum - s.lr * g)",
        {
            "heavy ball": "w + momentum",
            "no gradient in the step": "w + s.momentum * momentum",
            "momentum not scaled": "w + (momentum - s.lr * g)",
            "sign of the gradient": "w + (s.momentum * momentum + s.lr * g)",
        },
    ),
    ("nag.py", "- s.lr * g), (momentum,)", {"momentum is not kept": "- s.lr * g), state"}),
]


def test_formula() -> None:
    """Nesterov's look-ahead point y = x + momentum v is what is stored: both sequences are kept here."""

    def formula(y: Array, g: Array, state: dict[str, Array], t: int) -> Array:
        v = zeros_at_first(state, "v", y)
        x = y - MOMENTUM * v
        state["v"] = MOMENTUM * v - LR * (g + WD * y)
        x = x + state["v"]
        return x + MOMENTUM * state["v"]

    assert_follows(formula, "nag", learning_rate=LR, momentum=MOMENTUM, wd=WD)


def test_without_momentum_is_sgd() -> None:
    assert_follows(lambda w, g, state, t: w - LR * (g + WD * w), "nag", learning_rate=LR, momentum=0.0, wd=WD)


def test_by_hand() -> None:
    # buffer -0.25: 1 - 0.5 * 0.25 - 0.25
    assert one_step("nag", 1.0, 1.0, learning_rate=0.25, momentum=0.5) == 0.625
