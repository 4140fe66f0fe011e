import dataclasses
from operator import attrgetter

import pytest

from pixart.config.keys import overrides, reference
from pixart.config.keys.fields import fields_by_key, sections
from pixart.config.recipe import Recipe
from pixart.recipes import RECIPES


def leaves(config, prefix=""):
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from leaves(value, f"{prefix}{field.name}.")
        elif prefix:
            yield f"{prefix}{field.name}", value


@pytest.mark.parametrize("name", RECIPES)
def test_every_key_is_listed_with_the_recipes_value(name):
    recipe = RECIPES[name]("home")
    assert [(key.name, key.default) for key in reference.keys(recipe)] == list(leaves(recipe))


@pytest.mark.parametrize("key", reference.keys(RECIPES["xl"]("home")), ids=attrgetter("name"))
def test_every_key_has_a_meaning_and_a_type(key):
    assert key.meaning[0].isupper()
    assert key.meaning.endswith(".")
    assert "\n" not in key.meaning
    assert len(key.meaning.split()) > 3
    assert key.type


def test_types():
    types = {key.name: key.type for key in reference.keys(RECIPES["demo"]("home"))}
    assert types["stage1.steps"] == "a whole number"
    assert types["stage1.lr"] == "a number"
    assert types["stage1.compile"] == "true or false"
    assert types["data.source"] == "a string"
    assert types["data.max_images"] == "a whole number or none"
    assert types["stage1.activation_checkpointing"] == "none, selective or full"


def test_keys_that_meanings_mention_exist():
    keys = fields_by_key()
    mentioned = {
        word.strip(".,;()`")
        for key in reference.keys(RECIPES["demo"]("home"))
        for word in key.meaning.split()
        if word.startswith(tuple(f"{section}." for section in sections(Recipe)))
    }
    assert {"data.short_captions", "stage2.short_caption_prob"} <= mentioned
    for key in mentioned:
        assert overrides.find(key) is keys[key]


def test_a_field_without_a_meaning_has_an_empty_one():
    assert reference.meanings(reference.Key)["name"].startswith("Dotted name")
    assert reference.meanings(Recipe)["data"] == ""
