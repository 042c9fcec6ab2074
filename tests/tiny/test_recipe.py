import dataclasses
import pickle
import subprocess
import sys

import pytest

from backends.tiny import RECIPES, ArithmeticMix, LockersMix, ModelSizes, SpellingMix, TinyRecipe
from backends.tiny import recipe as recipe_module
from gym_sdk.errors import ConfigurationError


def test_every_field_changes_the_fingerprint() -> None:
    default = TinyRecipe()
    others = [
        default,
        TinyRecipe.untrained(),
        TinyRecipe.untrained(seed=1),
        dataclasses.replace(default, seed=1),
        dataclasses.replace(default, copy_steps=1),
        dataclasses.replace(default, trace_steps=1),
        dataclasses.replace(default, batch_size=1),
        dataclasses.replace(default, learning_rate=1.0),
        dataclasses.replace(default, matrix_learning_rate=1.0),
        dataclasses.replace(default, mix=ArithmeticMix(good=1.0, guess=0.0, wrong_expression=0.0)),
        dataclasses.replace(default, sizes=ModelSizes(hidden_size=64)),
    ]
    assert len({recipe.fingerprint() for recipe in others}) == len(others)
    assert TinyRecipe().fingerprint() == default.fingerprint()


@pytest.mark.parametrize(
    ("name", "value"),
    [("FORMAT_VERSION", -1), ("CHAT_TEMPLATE", "{{ messages }}"), ("MARKUP_TOKENS", ())],
)
def test_constants_change_the_fingerprint(monkeypatch: pytest.MonkeyPatch, name: str, value: object) -> None:
    before = TinyRecipe().fingerprint()
    monkeypatch.setattr(recipe_module, name, value)
    assert TinyRecipe().fingerprint() != before


def test_the_default_policy_stays_the_same() -> None:
    """Whoever has it in the cache keeps it, and measurements made with it stay comparable."""
    assert TinyRecipe().fingerprint() == "c0461c7c4bef99e1"


def test_each_family_has_a_recipe_of_its_own() -> None:
    assert {name: recipe.mix.family for name, recipe in RECIPES.items()} == {name: name for name in RECIPES}
    assert RECIPES["arithmetic"] == TinyRecipe()
    same_steps = [TinyRecipe(mix=recipe.mix) for recipe in RECIPES.values()]
    assert len({recipe.fingerprint() for recipe in same_steps}) == len(RECIPES)


def test_a_familys_vocabulary_and_tool_change_the_fingerprint(monkeypatch: pytest.MonkeyPatch) -> None:
    before = TinyRecipe(mix=LockersMix()).fingerprint()
    with monkeypatch.context() as patch:
        patch.setattr(LockersMix, "tool", None)
        assert TinyRecipe(mix=LockersMix()).fingerprint() != before
    vocabulary = LockersMix.vocabulary
    for field, value in (("pieces", "."), ("texts", ("other",))):
        with monkeypatch.context() as patch:
            patch.setattr(LockersMix, "vocabulary", dataclasses.replace(vocabulary, **{field: value}))
            assert TinyRecipe(mix=LockersMix()).fingerprint() != before


def test_the_fingerprint_is_the_same_in_another_process() -> None:
    code = "from backends.tiny import TinyRecipe; import sys; sys.stdout.write(TinyRecipe().fingerprint())"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output == TinyRecipe().fingerprint()


def test_importing_the_package_loads_no_torch() -> None:
    code = (
        "import backends.tiny, sys; bad = {'torch', 'transformers', 'tokenizers'} & set(sys.modules); "
        "assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    "make",
    [
        lambda: ArithmeticMix(good=0.5, guess=0.5, wrong_expression=0.5),
        lambda: ArithmeticMix(good=1.5, guess=-0.5, wrong_expression=0.0),
        lambda: ArithmeticMix(basic_arithmetic=2.0),
        lambda: LockersMix(follow=1.0),
        lambda: SpellingMix(backward=-0.5, half=0.5, forward=1.0),
        lambda: TinyRecipe(copy_steps=-1),
        lambda: TinyRecipe(trace_steps=-1),
        lambda: TinyRecipe(batch_size=0),
        lambda: TinyRecipe(learning_rate=0.0),
        lambda: TinyRecipe(matrix_learning_rate=float("nan")),
        lambda: ModelSizes(hidden_size=0),
        lambda: ModelSizes(num_attention_heads=3, num_key_value_heads=2),
    ],
)
def test_bad_numbers_are_refused(make) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ConfigurationError):
        make()


def test_a_recipe_is_a_value() -> None:
    recipe = TinyRecipe(seed=3)
    assert pickle.loads(pickle.dumps(recipe)) == recipe
    assert hash(recipe) == hash(TinyRecipe(seed=3))
