"""Hostile values of all configuration keys, on the command line and in TOML files."""

from pixart.config.keys import overrides
from pixart.config.keys.fields import fields_by_key
from pixart.config.recipe import from_json, to_json
from pixart.recipes import RECIPES
from tests.attack.campaign import campaign
from tests.attack.hostile import TEXTS


def test_a_hostile_value_is_refused_or_kept_exactly(record_property):
    """An accepted value survives the run's record and, unless TOML cannot hold it, a configuration file."""
    attack = campaign("configuration values", short=3000, long=12_000)
    recipe = RECIPES["demo"]("home")
    cases = [(key, text) for key in fields_by_key() for text in TEXTS]
    attack.generator.shuffle(cases)
    for key, text in cases[: attack.tries]:
        name = f"{key}={text[:40]!r}"
        changed = attack.attempt(name, lambda key=key, text=text: overrides.apply(recipe, [f"{key}={text}"]))
        if changed is None:
            continue
        if attack.attempt(name, lambda changed=changed: from_json(to_json(changed))) not in (changed, None):
            attack.wrong(name, "its record has another value")
    attack.finish(record_property)


def test_hostile_values_in_files_and_words(record_property, tmp_path):
    """`config` prints the configuration with the value, or one line of an error."""
    attack = campaign("configuration files", short=400, long=2500)
    keys = list(fields_by_key())
    for _ in range(attack.tries // 2):
        key, text = attack.generator.choice(keys), attack.generator.choice(TEXTS)
        attack.command(key, ["config", "--set", f"{key}={text}"])
        section, _, last = key.rpartition(".")
        content = (
            f"[{section}]\n{last} = {attack.generator.choice([repr(text), text, '[' * 90_000, '{}', '[1, [2]]'])}\n"
        )
        (tmp_path / "run.toml").write_bytes(content.encode("utf-8", "surrogateescape"))
        attack.command(key, ["config", "--config", str(tmp_path / "run.toml")])
    attack.finish(record_property)
