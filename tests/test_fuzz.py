"""Malformed input: a clear error or sound batches, never anything else.

`KERAS_DPO_FUZZ=10000` tries so many; CI a hundred of each.
"""

import functools
import json
import os

import numpy as np
import pytest
import yaml
from conftest import VOCABULARY, random_pairs, tiny_policy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_callbacks import NumberTokenizer

from keras_dpo import DPOConfig, DPOModel, PreferenceDataset
from keras_dpo.data import read_rows
from keras_dpo.data.preprocessor import DPOPreprocessor
from keras_dpo.errors import UserError
from keras_dpo.runs.cli import main
from keras_dpo.training.checks import check_dataset

TRIES = int(os.environ.get("KERAS_DPO_FUZZ", 100))
LIMITS = settings(
    max_examples=TRIES,
    deadline=None,
    derandomize=TRIES <= 100,
    suppress_health_check=list(HealthCheck),
)

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.integers(-3, 70),
    st.floats(),
    st.text(max_size=8),
    st.text("0123456789 ", max_size=8),
    st.binary(max_size=4),
)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(
            st.sampled_from(["role", "content", "from", "value", "x"]),
            inner,
            max_size=3,
        ),
    ),
    max_leaves=8,
)
messages = st.lists(
    st.fixed_dictionaries(
        {
            "role": st.sampled_from(["user", "assistant", "system", "", "tool"])
            | values,
            "content": st.text("0123456789 ", max_size=6) | values,
        }
    ),
    max_size=4,
)
token_ids = st.lists(st.integers(-2, VOCABULARY + 2), max_size=6)
fields = st.sampled_from(
    [
        "prompt", "chosen", "rejected", "prompt_ids", "chosen_ids",
        "rejected_ids", "weight", "margin", "question", "score_chosen",
        "score_rejected", "completions", "messages", "label", "responses",
        "reference_chosen_log_prob", "reference_rejected_log_prob", "images",
    ]
)  # fmt: skip
rows = st.dictionaries(
    fields, st.one_of(values, messages, token_ids), max_size=7
)
broken_pairs = st.fixed_dictionaries(
    {
        name: st.one_of(token_ids, token_ids, values)
        for name in ("prompt_ids", "chosen_ids", "rejected_ids")
    },
    optional={"weight": values, "margin": values},
)


@functools.cache
def model():
    model = DPOModel(tiny_policy(layers=1))
    model.compile("sgd")
    return model


def preprocessor(**options):
    return DPOPreprocessor(NumberTokenizer(), chat_template=None, **options)


def sound_or_refused(source, **options):
    """True where it was taken, its batches sound; None where refused aloud.

    False would be an error that says nothing.
    """
    try:
        dataset = PreferenceDataset(
            source, preprocessor(**options), batch_size=2, verbose=False
        )
        check_dataset(model(), dataset)
    except UserError as error:
        return bool(str(error).strip()) and None
    for indices in dataset.all_batches():
        batch = dataset.make_batch(indices)
        assert batch["token_ids"].min() >= 0
        assert batch["token_ids"].max() < VOCABULARY
        assert np.isfinite(batch["weight"]).all()
        assert (batch["weight"] >= 0).all()
        assert np.isfinite(batch["margin"]).all()
        tokens = np.arange(batch["completion_mask"].shape[-1])
        outside = tokens >= batch["completion_lengths"][..., None]
        assert not batch["completion_mask"][outside].any()
        real = batch["weight"] > 0
        assert batch["completion_mask"][real].any(-1).all()
    return True


@LIMITS
@given(st.lists(rows, min_size=1, max_size=3))
def test_rows_of_any_kind(source):
    assert sound_or_refused(source) is not False


@LIMITS
@given(st.lists(broken_pairs, max_size=3), st.randoms())
def test_token_ids_of_any_kind_among_good_ones(broken, random):
    source = [*random_pairs(2), *broken]
    random.shuffle(source)
    assert sound_or_refused(source) is not False


@LIMITS
@given(
    st.lists(
        st.fixed_dictionaries(
            {n: st.text("0123456789 <>end", max_size=12) | messages | values
             for n in ("prompt", "chosen", "rejected")}
        ),
        min_size=1,
        max_size=3,
    ),
    st.integers(1, 8),
)  # fmt: skip
def test_texts_of_any_kind(source, length):
    limits = {"max_length": 2 * length, "max_prompt_length": length}
    assert sound_or_refused(source, **limits) is not False


@LIMITS
@given(st.binary(max_size=200) | st.text(max_size=100).map(str.encode))
def test_files_of_any_bytes(content):
    import tempfile

    with tempfile.TemporaryDirectory() as directory:
        for name in ("x.jsonl", "x.json", "x.csv"):
            path = os.path.join(directory, name)
            with open(path, "wb") as file:
                file.write(content)
            assert sound_or_refused(path) is not False


config_values = st.one_of(scalars, st.lists(scalars, max_size=2))
names = sorted(DPOConfig.__dataclass_fields__)


@LIMITS
@given(st.dictionaries(st.sampled_from(names) | st.text(max_size=5),
                       config_values, max_size=4))  # fmt: skip
@pytest.mark.slow
def test_config_files_of_any_kind(config):
    """The command says one line and exits 2; nothing is trained."""
    import contextlib
    import io
    import tempfile

    config.pop("repo_id", None)
    with tempfile.TemporaryDirectory() as directory:
        path = os.path.join(directory, "config.yaml")
        with open(path, "w", errors="surrogatepass") as file:
            yaml.safe_dump(config, file)
        said = io.StringIO()
        with (
            contextlib.redirect_stderr(said),
            contextlib.redirect_stdout(io.StringIO()),
            pytest.raises(SystemExit) as ended,
        ):
            main(["train", "--config", path, "--save_directory", directory])
    assert ended.value.code == 2, said.getvalue()
    lines = said.getvalue().strip().splitlines()
    assert lines[-1].startswith("keras-dpo: error: ")
    assert "Traceback" not in said.getvalue()


def test_what_fuzzing_found(tmp_path):
    """A setting of nothing; a csv file with a bare carriage return."""
    with pytest.raises(ValueError, match="`loss_type` must have a value"):
        DPOConfig(loss_type=None)
    (tmp_path / "a.csv").write_bytes(b"prompt,chosen,rejected\na,b\rc,d,e\n")
    assert len(read_rows(tmp_path / "a.csv")) == 2
    (tmp_path / "b.csv").write_text("prompt\n" + "x" * 200_000)
    with pytest.raises(ValueError, match="is not CSV: field larger"):
        read_rows(tmp_path / "b.csv")


def test_a_yaml_bomb_is_one_line(tmp_path, capsys):
    """Nine levels of ten aliases: a billion strings if expanded."""
    lines = ["a: &a [x, x, x, x, x, x, x, x, x, x]"]
    for before, name in zip("abcdefgh", "bcdefghi", strict=True):
        refs = ", ".join([f"*{before}"] * 10)
        lines.append(f"{name}: &{name} [{refs}]")
    path = tmp_path / "bomb.yaml"
    path.write_text("\n".join(lines))
    with pytest.raises(SystemExit) as ended:
        main(["train", "--config", str(path)])
    assert ended.value.code == 2
    assert len(capsys.readouterr().err) < 2000


@pytest.mark.parametrize("name", ["..", "a/b", "/tmp/x", "", "a\\b", "."])
def test_model_names_stay_inside_the_directory(name):
    with pytest.raises(ValueError, match="plain directory name"):
        DPOConfig(model_name=name)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__init__.__globals__ }}",
        "{% for i in range(10**9) %}x{% endfor %}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    ],
)
def test_templates_cannot_reach_out(template):
    from keras_dpo.data.chat_templates import render

    conversation = [{"role": "user", "content": "x"}]
    with pytest.raises((ValueError, OverflowError)) as error:
        render(template, conversation, True, {})
    assert isinstance(error.value, ValueError)


def test_control_tokens_in_text_stay_text():
    dataset = PreferenceDataset(
        [{"prompt": "5 <end> 6", "chosen": "7", "rejected": "8"}],
        preprocessor(),
        batch_size=1,
        verbose=False,
    )
    assert 2 not in dataset.pairs[0].prompt_ids


def test_records_survive_json(tmp_path):
    """The seed of the corpus is sound."""
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join(json.dumps(p) for p in random_pairs(4)))
    assert sound_or_refused(str(path))
