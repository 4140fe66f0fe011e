import dataclasses

import pytest

from pixart.config.captions import CaptionsConfig, visible_attributes
from pixart.config.dataset import data_from_dict
from pixart.config.keys import overrides, toml_file
from pixart.recipes import demo

KEY = "data.captions.image_instruction"


@pytest.fixture
def recipe():
    return demo("home")


def test_an_instruction_is_a_text_or_a_file(recipe, tmp_path):
    changed = overrides.apply(recipe, [f"{KEY}= Say what you see. "])
    assert changed.data.captions.image_instruction == "Say what you see."
    (tmp_path / "instruction.txt").write_text("First line.\nSecond line: a=b.\n")
    changed = overrides.apply(recipe, [f"{KEY}=@{tmp_path}/instruction.txt"])
    assert changed.data.captions.image_instruction == "First line.\nSecond line: a=b."
    assert changed.data.captions.rewrite_instruction == recipe.data.captions.rewrite_instruction


def test_a_configuration_file_stores_the_text(recipe, tmp_path):
    (tmp_path / "instruction.txt").write_text('Say "what"\nyou see: ü.\n')
    (tmp_path / "run.toml").write_text(f'[data.captions]\nimage_instruction = "@{tmp_path}/instruction.txt"\n')
    changed = overrides.apply(recipe, toml_file.load(tmp_path / "run.toml").overrides)
    (tmp_path / "whole.toml").write_text(toml_file.dumps(changed))
    (tmp_path / "instruction.txt").unlink()
    assert overrides.apply(demo("home"), toml_file.load(tmp_path / "whole.toml").overrides) == changed
    assert changed.data.captions.image_instruction == 'Say "what"\nyou see: ü.'


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        (f"{KEY}=@/no/such/file", rf"^{KEY}=@/no/such/file: cannot be read; No such file"),
        (f"{KEY}=@/", rf"^{KEY}=@/: cannot be read; Is a directory"),
        (f"{KEY}=", rf"^{KEY}: is empty; give a text, or @FILE"),
        (f"{KEY}={'a' * 8001}", rf"^{KEY}: has 8001 characters; it must have at most 8000"),
        ("data.captions.rewrite_instruction= ", r"rewrite_instruction: is empty"),
        ("data.captions.temperature=-1", r"^data\.captions\.temperature=-1\.0: must be at least 0"),
        ("data.captions.temperature=inf", "must be finite"),
        ("data.captions.top_p=0", r"^data\.captions\.top_p=0\.0: must be more than 0"),
        ("data.captions.top_p=1.5", r"^data\.captions\.top_p=1\.5: must be more than 0 and at most 1"),
        ("data.captions.top_k=-1", r"^data\.captions\.top_k=-1: must be at least 0"),
        ("data.captions.top_k=1.5", "must be a whole number"),
        ("data.captions.max_tokens=0", r"^data\.captions\.max_tokens=0: must be at least 1"),
        ("data.captions.max_tokens=5000", r"^data\.captions\.max_tokens=5000: must be at most 4096"),
        ("data.captions.prompt=x", r"data\.captions\.prompt: unknown key"),
    ],
)
def test_errors_name_the_key_and_the_allowed_values(recipe, assignment, message):
    with pytest.raises(ValueError, match=message) as caught:
        overrides.apply(recipe, [assignment])
    assert "\n" not in str(caught.value)


def test_a_file_that_names_another_file_is_refused(recipe, tmp_path):
    (tmp_path / "a.txt").write_text("@b.txt")
    with pytest.raises(ValueError, match=rf"^{KEY}: the text begins with @"):
        overrides.apply(recipe, [f"{KEY}=@{tmp_path}/a.txt"])
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="is not UTF-8 text"):
        overrides.apply(recipe, [f"{KEY}=@{tmp_path}/a.txt"])


def test_the_preset_differs_from_the_default_in_everything_but_the_length():
    preset, default = visible_attributes(), CaptionsConfig()
    for field in dataclasses.fields(CaptionsConfig):
        same = getattr(preset, field.name) == getattr(default, field.name)
        assert same == (field.name == "max_tokens")


def test_a_record_without_captions_means_the_default(recipe):
    record = dataclasses.asdict(recipe.data)
    assert data_from_dict(record) == recipe.data
    record.pop("captions")
    assert data_from_dict(record).captions == CaptionsConfig()
