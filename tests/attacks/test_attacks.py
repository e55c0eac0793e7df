"""What every attack must keep, and how near to the optimum it comes where that is known."""

from __future__ import annotations

import inspect
import math
from typing import get_args, get_type_hints

import pytest
import torch
from torch import Tensor
from toys import Linear, asked, attackable

from robusteval.errors import UsageError
from robusteval.models.classifier import Classifier, predict_classes
from robusteval.models.steps import count_passes
from robusteval.registry import ATTACKS, parse
from robusteval.registry.signatures import PROTOCOL, list_choices
from robusteval.search.balls import measure_distances, quantise
from robusteval.search.descent import Stop

NAMES = list(ATTACKS.entries)
CASES = [(name, norm) for name in NAMES for norm in ATTACKS.entries[name].norms]
# those that search a ball
BOUNDED = [(name, norm) for name, norm in CASES if "eps" in asked(name, norm=norm, eps=0.0)]
BALL = ("linf", "l2")
GRADIENT = [
    name
    for name, entry in ATTACKS.entries.items()
    if entry.knowledge == "white-box" and entry.norms == BALL
]
SEEDS = torch.arange(8) * 1000
STEPS = 10  # what every attack keeps, it keeps in each step


def labels_of(model: Classifier, x: Tensor) -> Tensor:
    with torch.no_grad():
        return predict_classes(model(x))


@pytest.mark.parametrize("factor", [1.02, 1.25])
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("name", GRADIENT)
def test_gradient_attacks_succeed_just_beyond_the_known_boundary(
    linear: Classifier, grey_images: Tensor, name: str, norm: str, factor: float
) -> None:
    """Each image is attacked with a little more than its own distance to the hyperplane."""
    network = linear.network
    assert isinstance(network, Linear)
    y = labels_of(linear, grey_images)
    for i, distance in enumerate(network.distance(grey_images, norm).tolist()):
        x, label = grey_images[i : i + 1], y[i : i + 1]
        x_adv = ATTACKS.load(name)(linear, x, label, norm=norm, eps=factor * distance)
        assert labels_of(linear, x_adv).ne(label).all()


@pytest.mark.parametrize(("name", "norm"), [case for case in BOUNDED if "l0" not in case[1]])
def test_no_attack_succeeds_short_of_the_known_boundary(
    linear: Classifier, grey_images: Tensor, name: str, norm: str
) -> None:
    """There is no adversarial image in the ball, so none may be returned."""
    network = linear.network
    assert isinstance(network, Linear)
    y = labels_of(linear, grey_images)
    eps = 0.98 * float(network.distance(grey_images, norm).min())
    model = attackable(name, linear)

    settings = asked(name, norm=norm, eps=eps)
    x_adv = ATTACKS.load(name)(model, grey_images, y, seeds=SEEDS, **settings)

    assert labels_of(linear, x_adv).equal(y)


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize(("name", "norm"), BOUNDED)
def test_results_lie_in_ball_and_box(
    bands: Classifier, name: str, norm: str, targeted: bool
) -> None:
    """Measured in float64; shape and dtype are those of the images, which are not modified."""
    x = torch.rand(8, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    kept, y = x.clone(), torch.arange(8) % 3
    model, eps = attackable(name, bands), 0.07

    settings = asked(name, norm=norm, eps=eps, steps=2 * STEPS)
    x_adv = ATTACKS.load(name)(model, x, y, targeted=targeted, seeds=SEEDS, **settings)

    assert torch.equal(x, kept)
    assert (x_adv.shape, x_adv.dtype) == (x.shape, x.dtype)
    assert not x_adv.requires_grad
    assert bool(((x_adv >= 0) & (x_adv <= 1)).all())
    assert bool((measure_distances(x_adv, x)[norm] <= settings["eps"]).all())


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize(("name", "norm"), [case for case in CASES if case not in BOUNDED])
def test_results_are_images_like_those_given(
    bands: Classifier, name: str, norm: str, targeted: bool
) -> None:
    """Where there is no ball, too: in the box, of the same shape and dtype."""
    x = torch.rand(4, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    kept, y = x.clone(), torch.arange(4) % 3
    model = attackable(name, bands)
    settings = asked(name, norm=norm, steps=2 * STEPS)

    x_adv = ATTACKS.load(name)(model, x, y, targeted=targeted, seeds=SEEDS[:4], **settings)

    assert torch.equal(x, kept)
    assert (x_adv.shape, x_adv.dtype) == (x.shape, x.dtype)
    assert not x_adv.requires_grad
    assert bool(((x_adv >= 0) & (x_adv <= 1)).all())


@pytest.mark.parametrize(("name", "norm"), CASES)
def test_the_model_is_left_as_it_was(bands: Classifier, name: str, norm: str) -> None:
    """No gradients, no hooks, every mode as before."""
    x = torch.rand(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    model = attackable(name, bands)
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    grads = [parameter.grad for parameter in model.parameters()]

    ATTACKS.load(name)(
        model, x, labels_of(model, x), seeds=SEEDS[:2], **asked(name, norm=norm, steps=5)
    )

    assert not any(module.training for module in model.modules())
    assert all(p.grad is grad for p, grad in zip(model.parameters(), grads, strict=True))
    for module in model.modules():
        hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
        assert not any(hooks)
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(("name", "norm"), BOUNDED)
def test_a_radius_of_zero_returns_the_images(bands: Classifier, name: str, norm: str) -> None:
    """To the bit."""
    x = torch.rand(4, 3, 12, 12, generator=torch.Generator().manual_seed(0))

    settings = asked(name, norm=norm, eps=0.0, steps=STEPS)
    model = attackable(name, bands)
    x_adv = ATTACKS.load(name)(model, x, labels_of(model, x), seeds=SEEDS[:4], **settings)

    assert torch.equal(x_adv, x)


@pytest.mark.parametrize(("name", "norm"), CASES)
def test_a_result_does_not_depend_on_the_batch(bands: Classifier, name: str, norm: str) -> None:
    """Together, one by one, or in another order: the same bits."""
    x = torch.rand(5, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    y, model = labels_of(bands, x), attackable(name, bands)
    order = torch.tensor([4, 0, 2, 1, 3])

    def attack(some: Tensor) -> Tensor:
        settings = asked(name, norm=norm, eps=0.05, steps=STEPS)
        found = ATTACKS.load(name)(model, x[some], y[some], seeds=SEEDS[some], **settings)
        assert isinstance(found, Tensor)
        return found

    together = attack(torch.arange(5))

    assert torch.equal(torch.cat([attack(torch.tensor([i])) for i in (0, 3)]), together[[0, 3]])
    assert torch.equal(attack(order), together[order])


@pytest.mark.parametrize(("name", "norm"), CASES)
def test_masked_pixels_are_not_touched(bands: Classifier, name: str, norm: str) -> None:
    """Zero in the mask."""
    x = torch.rand(4, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(1, 1, 12, 12)
    mask[..., :6] = 0

    settings, model = asked(name, norm=norm, eps=0.05, steps=STEPS), attackable(name, bands)
    x_adv = ATTACKS.load(name)(
        model, x, labels_of(model, x), seeds=SEEDS[:4], mask=mask, **settings
    )

    assert torch.equal(x_adv[..., :6], x[..., :6])
    assert not torch.equal(x_adv[..., 6:], x[..., 6:])


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_batch_costs_nothing(bands: Classifier, name: str) -> None:
    """This is how parameters are checked before a run: no more than one call of the network.

    One more of those that change maps: whether these have a derivative is tried on one image.
    """
    x, y = torch.empty(0, 3, 12, 12), torch.empty(0, dtype=torch.int64)
    calls: list[int] = []
    handle = bands.network.register_forward_hook(lambda *_: calls.append(1))

    x_adv = ATTACKS.load(name)(attackable(name, bands), x, y)
    handle.remove()

    assert x_adv.shape == x.shape
    assert len(calls) <= (2 if name in ("advedge", "evade") else 1)


@pytest.mark.parametrize("name", NAMES)
def test_an_attack_without_seeds_is_deterministic(bands: Classifier, name: str) -> None:
    """And leaves torch's global random state alone."""
    x = torch.rand(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    y, state = labels_of(bands, x), torch.get_rng_state()
    model, settings = attackable(name, bands), asked(name, steps=STEPS)

    first, second = (ATTACKS.load(name)(model, x, y, **settings) for _ in range(2))

    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", NAMES)
def test_docstrings_name_the_paper_and_the_units(name: str) -> None:
    """Shapes, units, errors and source."""
    text = inspect.getdoc(ATTACKS.load(name)) or ""

    for word in ("arXiv:", "pixel range", "(n, c, h, w)", "Raises", "Returns"):
        assert word in text, word
    for parameter in ATTACKS.entries[name].parameters:
        assert f"\n{parameter} : " in text, parameter


@pytest.mark.parametrize("name", NAMES)
def test_the_catalogue_says_what_the_signature_says(name: str) -> None:
    """It is read from source; the function is the truth."""
    real = inspect.signature(ATTACKS.load(name)).parameters
    entry = ATTACKS.entries[name]

    assert set(real) == set(PROTOCOL) | set(entry.parameters)
    for key, parameter in entry.parameters.items():
        assert real[key].default == parameter.default
        assert real[key].kind is inspect.Parameter.KEYWORD_ONLY


@pytest.mark.parametrize("name", NAMES)
def test_words_are_those_of_the_types(name: str) -> None:
    """The catalogue reads from source which words a type allows; Python knows it at run time."""
    hints = get_type_hints(ATTACKS.load(name))

    for key, parameter in ATTACKS.entries[name].parameters.items():
        words = tuple(word for word in list_choices(hints[key]) if word is not None)
        assert parameter.choices == words


@pytest.mark.parametrize("name", NAMES)
def test_a_wrong_word_is_refused_before_anything_is_computed(name: str) -> None:
    """In a call from Python, too, where there is no specification that was checked."""
    for key, parameter in ATTACKS.entries[name].parameters.items():
        if parameter.choices:
            with pytest.raises(ValueError, match=f"{key} must be one of {parameter.choices[0]}"):
                ATTACKS.load(name)(None, None, None, **{key: "sideways"})
            with pytest.raises(UsageError, match=f"{name}: {key} must be one of"):
                ATTACKS.check_spec(parse(f"{name}:{key}=sideways"))


@pytest.mark.parametrize(
    "text",
    ["pgd:eps=-1", "pgd:eps=8", "pgd:steps=0", "pgd:restarts=0", "pgd:step=0", "noise:tries=0"],
)
def test_parameters_out_of_range_are_refused_on_an_empty_batch(
    bands: Classifier, text: str
) -> None:
    """One sentence that names the parameter."""
    spec = ATTACKS.check_spec(parse(text))
    x, y = torch.empty(0, 3, 12, 12), torch.empty(0, dtype=torch.int64)

    with pytest.raises(ValueError, match=next(iter(spec.parameters))):
        ATTACKS.load(spec.name)(bands, x, y, **spec.parameters)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pdg", "did you mean 'pgd'"),
        ("pgd:epsilon=1", "did you mean 'eps'"),
        ("pgd:eps=a lot", "a number or a fraction such as 8/255"),
        ("pgd:eps=1/0", "a number or a fraction"),
        ("pgd:eps=nan", "a number or a fraction"),
        ("pgd:steps=2.5", "a whole number"),
        ("pgd:norm=l7", "one of linf, l2"),
        ("pgd:random_start=maybe", "true or false"),
        ("pgd:eps", "key=value"),
        ("pgd:eps=.1,eps=.2", "each key once"),
        ("", "NAME:key=value"),
    ],
)
def test_mistyped_attacks_are_refused_with_what_is_known(text: str, message: str) -> None:
    """Before anything heavy is imported."""
    with pytest.raises(UsageError, match=message):
        ATTACKS.check_spec(parse(text))


def test_values_are_read_as_the_signature_says() -> None:
    """Fractions, words, and none."""
    spec = ATTACKS.check_spec(parse("pgd:eps=8/255,steps=20,step=none,random_start=False,norm=l2"))

    assert spec.parameters == {
        "eps": 8 / 255,
        "steps": 20,
        "step": None,
        "random_start": False,
        "norm": "l2",
    }
    assert str(spec) == "pgd:eps=8/255,steps=20,step=none,random_start=false,norm=l2"
    assert ATTACKS.check_spec(parse(str(spec))) == spec


def pgd(*args: object, **options: object) -> Tensor:
    found = ATTACKS.load("pgd")(*args, **options)
    assert isinstance(found, Tensor)
    return found


def images_of(bands: Classifier, count: int = 32) -> tuple[Tensor, Tensor]:
    x = torch.rand(count, 3, 12, 12, generator=torch.Generator().manual_seed(5))
    return quantise(x), labels_of(bands, x)


def test_successes_of_pgd_are_8_bit_images(bands: Classifier) -> None:
    """So they survive being saved."""
    x, y = images_of(bands)

    x_adv = pgd(bands, x, y, eps=12 / 255, steps=20)

    fooled = labels_of(bands, x_adv) != y
    assert fooled.float().mean() > 0.5
    torch.testing.assert_close(quantise(x_adv[fooled]), x_adv[fooled], atol=1e-7, rtol=0)


def test_pgd_stops_at_the_first_success_if_asked(bands: Classifier) -> None:
    """`float` costs no more passes than `8bit`, `8bit` no more than `never`."""
    x, y = images_of(bands)
    cost = {}
    for stop in get_args(Stop):
        with count_passes(bands, len(x), x.device) as passes:
            pgd(bands, x, y, eps=12 / 255, steps=20, stop=stop)
        cost[stop] = passes.backwards.sum().item()

    assert cost["never"] == 20 * len(x)
    assert cost["float"] <= cost["8bit"] < 0.6 * cost["never"]


def test_finished_images_cost_no_pass(bands: Classifier) -> None:
    """An image that is wrong from the start gets a single step's worth."""
    x, y = images_of(bands, 4)
    wrong = torch.where(torch.arange(4) < 2, (y + 1) % 3, y)

    with count_passes(bands, 4, x.device) as passes:
        pgd(bands, x, wrong, eps=1 / 255, steps=10, restarts=3, random_start=False)

    assert passes.backwards.tolist() == [1, 1, 30, 30]
    assert passes.forwards.tolist() == [2, 2, 33, 33]


def test_restarts_only_help(bands: Classifier) -> None:
    """Every image broken by one search is broken by three."""
    x, y = images_of(bands)

    once, thrice = (
        labels_of(bands, pgd(bands, x, y, seeds=torch.arange(32), eps=0.02, steps=3, restarts=r))
        != y
        for r in (1, 3)
    )

    assert bool((thrice | ~once).all())


def test_a_survivor_is_the_image_of_lowest_loss(linear: Classifier, grey_images: Tensor) -> None:
    """For a linear model that is a corner of the cube."""
    y = labels_of(linear, grey_images)
    network = linear.network
    assert isinstance(network, Linear)
    eps = 0.5 * float(network.distance(grey_images, "linf").min())

    x_adv = pgd(linear, grey_images, y, eps=eps, steps=40, loss="margin")

    direction = torch.where(y.view(-1, 1, 1, 1) == 1, -network.weight, network.weight).sign()
    torch.testing.assert_close(x_adv, grey_images + eps * direction, atol=1e-5, rtol=0)


def test_targets_are_reached(bands: Classifier) -> None:
    """Targeted: the class asked for."""
    x, y = images_of(bands)
    target = (y + 1) % 3

    x_adv = pgd(bands, x, target, targeted=True, eps=0.3, steps=50)

    assert labels_of(bands, x_adv).eq(target).float().mean() > 0.95


def test_logits_that_are_nan_end_the_search(bands: Classifier) -> None:
    """They count as an error of the model and must not poison the image."""

    class Broken(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.full((len(x), 3), math.nan) * x.sum()

    x = torch.rand(3, 3, 12, 12)

    x_adv = pgd(Broken(), x, torch.zeros(3, dtype=torch.int64))

    assert bool(x_adv.isfinite().all())
