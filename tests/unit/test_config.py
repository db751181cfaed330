"""The `sequence_parallel` block: what is read, what is refused, and that its documentation is that of the code."""

from __future__ import annotations

import base64
import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from ds_cp import config, launch, layout
from ds_cp.config import Config

ROOT = Path(__file__).resolve().parents[2]

WHOLE_BLOCK = """
// ds_config.json: everything else stays as DeepSpeed documents it
{
  "train_micro_batch_size_per_gpu": 1,
  "sequence_parallel": {
    "size": 16,                    // ranks that share one row; int or "auto" (= all ranks). 1 switches everything off
    "ulysses_size": "auto",        // heads-to-tokens all-to-all degree
    "ring_size": "auto",           // ring degree; ulysses_size * ring_size == size
    "layout": "auto",              // zigzag | balanced | contiguous
    "linear_attention": "auto",    // heads | state (3.4)
    "ring_impl": "auto",           // p2p | allgather
    "ring_keep": "auto",           // true | false
    "attention_head_chunks": "auto", // head groups that go through the all-to-all one after another; 1 = all at once
    "comm_timeout_s": 1800,        // a hop or all-to-all that takes longer ends the run with the rank and the step
    "profile": false,
    "attention_kernel": "auto",    // flash_attn (4, 3, 2) | torch_cudnn | torch_flash | torch_cpu | reference
    "delta_kernel": "auto",        // fla | reference
    "loss_reduction": "auto",      // mean | token_mean | sum (3.3)
    "loss_chunk": "auto",          // tokens per logits tile; 0 = materialise logits
    "loss_kernel": "auto",         // liger
    "tiled_mlp": "auto",
    "activation_offload": false    // checkpointed activations to pinned host memory
  }
}
"""

INTEGERS: tuple[tuple[str, int], ...] = (
    ("size", 1),
    ("ulysses_size", 1),
    ("ring_size", 1),
    ("attention_head_chunks", 1),
    ("comm_timeout_s", 1),
)
"""Fields that hold an integer, and the least one."""


def parse(**block: Any) -> Config:
    return config.parse({config.BLOCK: block})


def docs_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gen_config_docs", ROOT / "scripts" / "gen_config_docs.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# What is read


def test_the_whole_documented_block_parses_with_its_comments(tmp_path: Path) -> None:
    path = tmp_path / "ds_config.json"
    path.write_text(WHOLE_BLOCK)
    assert config.parse(path) == Config(size=16)


def test_the_documented_block_names_every_field_and_its_default() -> None:
    import hjson

    block = hjson.loads(WHOLE_BLOCK)[config.BLOCK]
    assert list(block) == list(Config.model_fields)
    assert dict(block) == {**Config().model_dump(), "size": 16}


def test_dict_str_path_and_base64_give_the_same_config(tmp_path: Path) -> None:
    source = {"bf16": {"enabled": True}, config.BLOCK: {"size": 8, "ulysses_size": 4, "ring_size": 2}}
    path = tmp_path / "ds_config.json"
    path.write_text(json.dumps(source))
    encoded = base64.urlsafe_b64encode(json.dumps(source).encode()).decode()  # as DeepSpeed's launcher passes it on
    wanted = Config(size=8, ulysses_size=4, ring_size=2)
    assert [config.parse(given) for given in (source, path, str(path), encoded)] == [wanted] * 4
    assert [config.load(given) for given in (source, path, str(path), encoded)] == [source] * 4


def test_base64_may_hold_the_two_url_safe_characters() -> None:
    source = {"note": "\u00fb\u00ff\u00bf?>~" * 3, config.BLOCK: {"size": 2}}
    encoded = base64.urlsafe_b64encode(json.dumps(source, ensure_ascii=False).encode()).decode()
    assert {"-", "_"} & set(encoded)
    assert config.load(encoded) == source


def test_load_gives_a_dict_of_its_own() -> None:
    source = {config.BLOCK: {"size": 2}}
    config.load(source)["zero_optimization"] = {}
    assert source == {config.BLOCK: {"size": 2}}


@pytest.mark.parametrize("source", [{}, {"bf16": {"enabled": True}}, {config.BLOCK: {}}], ids=["empty", "other", "empty block"])
def test_a_config_without_the_block_has_size_1(source: dict[str, Any]) -> None:
    assert config.parse(source) == Config()
    assert config.parse(source).size == 1


def test_the_config_is_frozen_and_hashable() -> None:
    parsed = parse(size=4)
    for name in Config.model_fields:
        with pytest.raises(ValidationError, match="frozen"):
            setattr(parsed, name, "auto")
    assert hash(parsed) == hash(parse(size=4))


# What is refused


def test_every_listed_value_parses() -> None:
    for field, info in Config.model_fields.items():
        for value in _listed(info.annotation):
            assert getattr(parse(**{field: value}), field) == value


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (True, config.Profile()),
        (False, None),
        ({}, config.Profile()),
        ({"steps": 5, "folder": "/traces"}, config.Profile(after=3, steps=5, folder="/traces")),
    ],
)
def test_a_profile_is_a_switch_or_an_object(given: Any, wanted: config.Profile | None) -> None:
    assert config.profile_of(parse(profile=given)) == wanted


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"step": 2}, r"sequence_parallel\.profile\.step: unknown key; did you mean 'steps'\? Known keys: after, steps, folder$"),
        ({"steps": 0}, r"^sequence_parallel\.profile\.steps: got 0, allowed: integer >= 1$"),
        ({"after": "2"}, r"^sequence_parallel\.profile\.after: got '2', allowed: integer >= 1$"),
        ({"folder": 3}, r"^sequence_parallel\.profile\.folder: got 3, allowed: string$"),
        (1, r"^sequence_parallel\.profile: got 1, allowed: boolean \| an object of after, steps, folder$"),
        ([True], r"^sequence_parallel\.profile: got \[True\], allowed: boolean \| an object of after, steps, folder$"),
    ],
)
def test_a_profile_that_is_neither_is_one_sentence(given: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse(profile=given)


def _listed(annotation: Any) -> list[Any]:
    """The strings of the literals in an annotation, and both values of a bool."""
    if annotation is bool:
        return [True, False]
    arguments = get_args(annotation)
    return [a for a in arguments if isinstance(a, str)] + [v for a in arguments if not isinstance(a, str) for v in _listed(a)]


@pytest.mark.parametrize(
    ("written", "near"),
    [
        ("siz", "size"),
        ("ulyses_size", "ulysses_size"),
        ("ring", "ring_size"),
        ("attention_kernal", "attention_kernel"),
        ("loss_reductions", "loss_reduction"),
        ("activation_offloading", "activation_offload"),
        ("comm_timeout", "comm_timeout_s"),
    ],
)
def test_an_unknown_key_names_the_nearest_and_all_known_ones(written: str, near: str) -> None:
    with pytest.raises(ValueError, match="unknown key") as refusal:
        parse(**{written: 2})
    message = str(refusal.value)
    assert message.startswith(f"sequence_parallel.{written}: unknown key; did you mean {near!r}?")
    assert message.endswith(", ".join(Config.model_fields))


def test_a_key_that_resembles_none_is_refused_too() -> None:
    with pytest.raises(ValueError, match=r"sequence_parallel\.\u20ac: unknown key"):
        parse(**{"\u20ac": 1})


@pytest.mark.parametrize(("field", "least"), INTEGERS)
def test_an_integer_field_refuses_what_is_not_an_integer_in_range(field: str, least: int) -> None:
    for value in (least - 1, "2", 2.0, True, None, [2]):
        with pytest.raises(ValueError, match="allowed") as refusal:
            parse(**{field: value})
        assert str(refusal.value).startswith(f"sequence_parallel.{field}: got {value!r}, allowed: integer >= {least}")


def test_layouts_are_those_that_can_be_built() -> None:
    assert config.Config.model_json_schema()["properties"]["layout"]["enum"] == list(layout.NAMES)


def test_a_name_that_no_version_has_is_refused_with_the_names() -> None:
    with pytest.raises(ValueError, match="allowed") as refusal:
        parse(layout="zig-zag")
    assert str(refusal.value) == (
        'sequence_parallel.layout: got \'zig-zag\', allowed: "auto" | "zigzag" | "balanced" | "contiguous"'
    )


def test_all_wrong_keys_are_told_at_once() -> None:
    with pytest.raises(ValueError, match="unknown key") as refusal:
        parse(size=0, layuot="zigzag", ring_impl="tcp")
    assert all(f"sequence_parallel.{field}:" in str(refusal.value) for field in ("size", "layuot", "ring_impl"))


degrees = st.integers(1, 12)


@given(size=st.integers(1, 144), ulysses=degrees, ring=degrees)
def test_two_degrees_are_legal_exactly_if_their_product_is_the_size(size: int, ulysses: int, ring: int) -> None:
    assert parse(size=ulysses * ring, ulysses_size=ulysses, ring_size=ring).size == ulysses * ring
    if ulysses * ring != size:
        with pytest.raises(ValueError, match=rf"ulysses_size {ulysses} x ring_size {ring} is {ulysses * ring}, not size {size};"):
            parse(size=size, ulysses_size=ulysses, ring_size=ring)


@pytest.mark.parametrize("field", ["ulysses_size", "ring_size"])
@given(size=st.integers(1, 36), degree=degrees)
def test_one_degree_is_legal_exactly_if_it_divides_the_size(field: str, size: int, degree: int) -> None:
    if size % degree == 0:
        assert getattr(parse(size=size, **{field: degree}), field) == degree
        return
    with pytest.raises(ValueError, match="does not divide") as refusal:
        parse(size=size, **{field: degree})
    divisors = [d for d in range(1, size + 1) if size % d == 0]
    assert str(refusal.value) == f"sequence_parallel.{field}: {degree} does not divide size {size}; use one of {divisors}"


def test_degrees_are_not_judged_before_an_auto_size_is_known() -> None:
    assert parse(size="auto", ulysses_size=3, ring_size=5).size == "auto"


@pytest.mark.parametrize("block", [None, 2, "auto", [2], True])
def test_a_block_that_is_not_an_object_is_refused(block: Any) -> None:
    with pytest.raises(ValueError, match="sequence_parallel: expected an object") as refusal:
        config.parse({config.BLOCK: block})
    assert repr(block) in str(refusal.value)


def test_a_missing_file_is_refused_with_its_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="neither a file, nor a dict, nor base64 JSON") as refusal:
        config.parse(tmp_path / "none.json")
    assert str(tmp_path / "none.json") in str(refusal.value)


@pytest.mark.parametrize(("text", "reason"), [('{"a": [}', "is not valid JSON"), ("[1, 2]", "holds list, expected a JSON object")])
def test_a_file_that_holds_no_object_is_refused_with_its_name(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "ds_config.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=reason) as refusal:
        config.parse(path)
    assert str(path) in str(refusal.value)
    with pytest.raises(ValueError, match=f"the base64 config {reason}"):
        config.parse(base64.urlsafe_b64encode(text.encode()).decode())


# Documentation


def test_every_field_has_a_docstring() -> None:
    assert [name for name, field in Config.model_fields.items() if not field.description] == []


def test_docs_config_md_is_what_the_code_says() -> None:
    written = (ROOT / "docs" / "config.md").read_text(encoding="utf-8")
    assert written == docs_script().render(), "run python scripts/gen_config_docs.py"


def test_the_docs_have_one_row_a_field() -> None:
    rows = [line for line in docs_script().render().splitlines() if line.startswith("| `")]
    fields = {**Config.model_fields, **config.Profile.model_fields}
    assert [row.split("`")[1] for row in rows] == list(fields)
    for row, field in zip(rows, fields.values(), strict=True):
        assert row.endswith(f"| {' '.join(field.description.split())} |")


@pytest.mark.parametrize("source", [None, 3, ["a"]])
def test_a_source_of_another_type_is_refused(source: Any) -> None:
    with pytest.raises(ValueError, match="expected a path, a dict or base64 JSON"):
        config.parse(source)


def test_a_key_that_stands_twice_is_refused(tmp_path: Any) -> None:
    path = tmp_path / "ds_config.json"
    path.write_text('{"sequence_parallel": {"size": 2, "size": 4}}')
    with pytest.raises(ValueError, match="'size' stands more than once"):
        config.parse(path)


@pytest.mark.parametrize(("field", "value"), [("tiled_mlp", "off"), ("profile", "yes"), ("profile", 0)])
def test_a_switch_takes_true_and_false_alone(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"sequence_parallel.{field}: got"):
        config.parse({"sequence_parallel": {field: value}})


@pytest.mark.parametrize(
    ("block", "told"),
    [
        ({}, None),
        ({"size": 1, "ring_size": 1}, None),
        ({"size": 2, "loss_chunk": 512}, None),
        ({"size": 1, "loss_chunk": 512}, r"size is 1, which is off, so loss_chunk does nothing; set size to 2 or more"),
        ({"tiled_mlp": True, "profile": True}, r"so profile, tiled_mlp do nothing"),
    ],
)
def test_what_a_block_that_is_off_sets_for_nothing_is_said(
    block: dict[str, Any], told: str | None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    launch.say_off(parse(**block))
    said = capsys.readouterr().out
    assert said == "" if told is None else told in said
    monkeypatch.setenv("RANK", "1")
    launch.say_off(parse(**block))
    assert capsys.readouterr().out == ""
