"""What README, docs and examples tell a reader to run does run.

On a machine as a reader has it: no `KERAS_BACKEND`, no Keras config. The files
and presets that the texts name are small ones of ours.
"""

import json
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import yaml
from chat_tokenizer import make_chat_tokenizer, save_chat_preset
from conftest import PAIRS, ROOT, environment, environment_of_devices

from keras_dpo import DPOConfig
from keras_dpo.runs import cli

PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
}
EXAMPLES = sorted(
    str(path.relative_to(ROOT / "examples"))
    for path in (ROOT / "examples").rglob("*")
    if path.is_file() and "__pycache__" not in path.parts
)

# How a command begins -> why it is not run here. What a pattern matches must
# still be there: the files of benchmarks are looked for.
NOT_RUN = {
    "pip install": "`.ci/run` installs",
    "keras-dpo demo": "tests/test_demo.py runs it",
    "python -m venv": "environments of other projects, for benchmarks",
    "trl/bin/": "environments of other projects, for benchmarks",
    "tunix/bin/": "environments of other projects, for benchmarks",
    "easydel/bin/": "environments of other projects, for benchmarks",
    "python tests/benchmarks/": "measures a real model, minutes to hours",
}
EXAMPLES_NOT_RUN = {"launch/ray_train.py": "needs Ray and its workers"}
# Quick on a tiny model, and so run in earnest; others are parsed and checked.
RUN_IN_EARNEST = ["README.md"]


def code_blocks(text, language):
    """(first line's number, code) of a page's fenced blocks."""
    pattern = rf"^```{language}\n(.*?)^```$"
    return [
        (text.count("\n", 0, found.start(1)) + 1, found.group(1))
        for found in re.finditer(pattern, text, re.M | re.S)
    ]


def commands_of(text):
    """The commands of a page's ```sh blocks, one by one."""
    found = []
    for _, code in code_blocks(text, "sh"):
        joined = re.sub(r"\\\n\s*", "", code)
        for line in joined.splitlines():
            line = re.sub(r"\s+#.*", "", line)
            found += [part for part in line.split(" && ") if part]
    return found


def is_not_run(command):
    return any(command.startswith(start) for start in NOT_RUN)


ALL_COMMANDS = [
    (page, command)
    for page, text in PAGES.items()
    for command in commands_of(text)
]
TO_RUN = [x for x in ALL_COMMANDS if not is_not_run(x[1])]


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    """What the texts name, made once."""
    directory = tmp_path_factory.mktemp("stock")
    rows = json.loads(PAIRS.read_text())
    lines = [json.dumps(row) + "\n" for row in rows]
    (directory / "train.jsonl").write_text("".join(lines[:16]))
    (directory / "valid.jsonl").write_text("".join(lines[16:]))
    shutil.copy(directory / "train.jsonl", directory / "pairs.jsonl")
    shutil.copy(PAIRS, directory / "dpo_en_demo.json")
    save_chat_preset(directory / "gemma3_instruct_270m", "Gemma3")
    for name in ("gemma3_instruct_1b", "path/or/preset"):
        shutil.copytree(directory / "gemma3_instruct_270m", directory / name)
    make_chat_tokenizer().save_pretrained(directory / "MODEL")
    (directory / "config.yaml").write_text(
        "repo_id: path/or/preset\ndataset_name: pairs.jsonl\n"
    )
    return directory


@pytest.fixture
def workplace(stock, tmp_path, monkeypatch):
    """A copy of it, where the texts' commands run."""
    directory = tmp_path / "workplace"
    shutil.copytree(stock, directory)
    monkeypatch.chdir(directory)
    return directory


@pytest.fixture
def reader(tmp_path):
    """Runs a command as a reader would, on eight simulated devices."""
    home = tmp_path / "home"
    home.mkdir()
    variables = environment_of_devices(8)
    for name in ("KERAS_BACKEND", "KERAS_HOME", "KERAS_DPO_CACHE"):
        variables.pop(name, None)
    variables["HOME"] = str(home)
    scripts = str(pathlib.Path(sys.executable).parent)
    variables["PATH"] = f"{scripts}:{variables['PATH']}"

    def run(*command, **options):
        done = subprocess.run(
            command,
            env=variables,
            capture_output=True,
            text=True,
            timeout=600,
            **options,
        )
        assert done.returncode == 0, f"{command}\n{done.stderr[-3000:]}"
        return done

    return run


# --- Python -----------------------------------------------------------------


def run_python_blocks(page, workplace, reader):
    """All of a page's, in their order, in one process, as they stand there."""
    code = [""] * PAGES[page].count("\n")
    for line, block in code_blocks(PAGES[page], "python"):
        for offset, text in enumerate(block.splitlines()):
            # A traceback shows the page's line numbers.
            code[line - 1 + offset] = text
    script = workplace / f"{pathlib.Path(page).stem}.py"
    script.write_text("\n".join(code))
    reader(sys.executable, str(script))


@pytest.mark.parametrize(
    "page",
    [
        page
        for page, text in PAGES.items()
        # The others run in `test_commands_run_in_earnest`.
        if code_blocks(text, "python") and page not in RUN_IN_EARNEST
    ],
)
@pytest.mark.slow
def test_python_blocks_run(page, workplace, reader):
    run_python_blocks(page, workplace, reader)


def test_readme_names_what_it_needs(workplace):
    """The fixtures are no more than the texts' own names."""
    text = "".join(PAGES.values())
    for path in workplace.iterdir():
        assert path.name in text, path.name


# --- Shell ------------------------------------------------------------------


def test_every_command_is_known():
    """Nothing is left out but what the list says, and the list is not old."""
    for start in NOT_RUN:
        assert any(c.startswith(start) for _, c in ALL_COMMANDS), start
    for _, command in TO_RUN:
        program = [
            word for word in shlex.split(command) if not is_setting(word)
        ][0]
        assert program in ("keras-dpo", "pytest", "python"), command
    for _, command in ALL_COMMANDS:
        for path in re.findall(r"(?:tests|examples)/\S+\.py", command):
            assert (ROOT / path).exists(), command


def is_setting(word):
    """True of `NAME=value` before a command."""
    return re.fullmatch(r"[A-Z_]+=.*", word) is not None


def check_settings(arguments, capsys):
    """Parse and check a command; leave the config that it would leave."""
    with pytest.raises(SystemExit) as end:
        cli.main([*arguments, "--print_config"])
    out, err = capsys.readouterr()
    assert not end.value.code, err
    settings = yaml.safe_load(out)
    settings.pop("show", None)
    config = DPOConfig(**settings)
    directory = pathlib.Path(config.save_directory) / config.model_name
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.yaml").write_text(yaml.safe_dump(settings))


@pytest.mark.parametrize(
    "page",
    [
        page
        for page in PAGES
        if any(p == page and c.startswith("keras-dpo") for p, c in TO_RUN)
    ],
)
def test_settings_of_commands_are_right(page, workplace, capsys):
    """Names and values are known and go together; nothing is trained."""
    for where, command in TO_RUN:
        words = shlex.split(command)
        if where == page and words[:1] == ["keras-dpo"]:
            if words[1] != "generate":
                check_settings(words[1:], capsys)


@pytest.mark.slow
@pytest.mark.parametrize("page", RUN_IN_EARNEST)
def test_commands_run_in_earnest(page, workplace, reader):
    """One after the other, as a reader would, after the page's Python.

    So README's command line takes the policy that its Python has saved.
    """
    run_python_blocks(page, workplace, reader)
    said = [
        reader("bash", "-c", command).stdout
        for where, command in TO_RUN
        if where == page and command.startswith("keras-dpo")
    ]
    assert len(said) == 6
    assert (workplace / "dpo_checkpoints/DPOTrainer/report.html").exists()
    assert "reward_accuracy" in said[4]
    assert said[5].strip()


@pytest.mark.slow
@pytest.mark.parametrize(
    "command", sorted({c for _, c in TO_RUN if re.search(r"\bpytest\b", c)})
)
def test_pytest_commands_select_tests(command, reader):
    """What takes hours by hand is there to be run."""
    listed = reader("bash", "-c", f"{command} --collect-only -q", cwd=ROOT)
    assert re.search(r"\.py(::|: [1-9])", listed.stdout), listed.stdout


# --- Examples ---------------------------------------------------------------


@pytest.mark.slow
def test_eight_devices(reader):
    """As docs/distributed.md says."""
    (command,) = (c for _, c in TO_RUN if "eight_devices" in c)
    said = reader("bash", "-c", command, cwd=ROOT).stdout
    assert "Epoch 2/2" in said


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ["own_loss.py"],
        ["lora_with_sync.py", "gemma3_instruct_270m", "train.jsonl"],
    ],
)
def test_examples_run(arguments, workplace, reader):
    name, *rest = arguments
    reader(sys.executable, str(ROOT / "examples" / name), *rest)


def test_every_example_is_tested():
    """By a test of this file, or the list says why not."""
    tested = [
        "eight_devices.py",
        "launch/slurm.sh",
        "launch/tpu_jobset.yaml",
        "lora_with_sync.py",
        "own_loss.py",
    ]
    assert sorted([*tested, *EXAMPLES_NOT_RUN]) == EXAMPLES
    for name in EXAMPLES_NOT_RUN:
        path = ROOT / "examples" / name
        compile(path.read_text(), path, "exec")


def test_slurm_script_s_command(workplace, reader, tmp_path, capsys):
    """With an `srun` that shows what it was given."""
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "srun").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tools / "srun").chmod(0o755)
    script = ROOT / "examples" / "launch" / "slurm.sh"
    said = reader(
        "bash", "-c", f'PATH="{tools}:$PATH" exec bash "{script}"'
    ).stdout.split()
    assert said[:2] == ["keras-dpo", "train"]
    check_settings(said[1:], capsys)


def test_jobset_s_command(workplace, capsys):
    path = ROOT / "examples" / "launch" / "tpu_jobset.yaml"
    (jobs,) = yaml.safe_load(path.read_text())["spec"]["replicatedJobs"]
    pod = jobs["template"]["spec"]["template"]["spec"]
    program, *arguments = pod["containers"][0]["command"]
    assert program == "keras-dpo"
    # Its volume's directory.
    here = [x.replace("/run/", f"{workplace}/") for x in arguments]
    check_settings(here, capsys)


# --- The backend ------------------------------------------------------------


def test_a_wrong_backend_is_told_what_to_do(tmp_path):
    """TensorFlow's, which is Keras' default, and in a running notebook."""
    variables = environment(HOME=str(tmp_path))
    del variables["KERAS_BACKEND"]
    done = subprocess.run(
        [sys.executable, "-c", "import keras, keras_dpo"],
        env=variables,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    error = done.stderr.strip().splitlines()[-1]
    assert error.startswith(
        "ImportError: keras_dpo needs the JAX backend of Keras. Received: "
        "backend='tensorflow'."
    )
    for remedy in (
        "KERAS_BACKEND=jax before Keras is imported",
        "restart the kernel",
        'os.environ["KERAS_BACKEND"] = "jax"',
    ):
        assert remedy in error


def test_readme_s_first_lines_choose_the_backend():
    """Before any import of Keras, and not where isort could move it."""
    for page, text in PAGES.items():
        whole = "".join(block for _, block in code_blocks(text, "python"))
        if "import keras" in whole:
            before = whole[: re.search(r"import .*keras", whole).start()]
            assert 'os.environ["KERAS_BACKEND"] = "jax"' in before, page
