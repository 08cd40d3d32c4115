"""The command line: `keras-dpo train|inspect|precompute|plan|...`."""

import dataclasses
import json
import os
import re
import sys
import typing
from collections.abc import Callable, Sequence
from typing import Any

# Keras-Hub imports TensorFlow if it is installed; silence its logs.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import docstring_parser  # noqa: E402
import jsonargparse  # noqa: E402
import yaml  # noqa: E402

from keras_dpo.errors import UserError  # noqa: E402
from keras_dpo.runs.config import DPOConfig  # noqa: E402
from keras_dpo.utils.messages import say  # noqa: E402

# Title of each help group -> its first setting; the rest follow in order.
GROUPS = {
    "Model": "model_name",
    "Data": "dataset_name",
    "Loss and reference": "loss_type",
    "Lengths and chat template": "max_length",
    "Optimization": "learning_rate",
    "Saving and logging": "save_directory",
}
MISTAKES = (
    UserError,
    jsonargparse.ArgumentError,
    FileNotFoundError,
    PermissionError,
)
# Diverged training or a full disk: not a mistake in the command line, and
# nothing that a traceback would explain.
FAILURES = (FloatingPointError, OSError)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line.

    A user error is one line and exit status 2; training that diverged and a
    failed write are one line and exit status 1; Ctrl-C is exit status 130. A
    bug in this package raises its traceback, with Python's exit status 1.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser, runners = _make_parser()
    try:
        arguments = _normal(arguments)
        _refuse_aliases(arguments)
        parsed = parser.parse_args(arguments)
        name = parsed["subcommand"]
        options = parsed[name].as_dict()
        options.pop("config", None)
        runners[name](**options)
    except (*MISTAKES, *FAILURES) as error:
        if os.environ.get("KERAS_DPO_TRACEBACK"):
            raise
        sys.stderr.write(f"keras-dpo: error: {_one_line(error)}\n")
        sys.exit(2 if isinstance(error, MISTAKES) else 1)
    except KeyboardInterrupt:
        sys.stderr.write("keras-dpo: interrupted\n")
        sys.exit(130)


def _one_line(error: Exception) -> str:
    text = re.sub(r"\s+", " ", str(error)).strip()
    return text or type(error).__name__


def _refuse_aliases(arguments: list[str]) -> None:
    """Raise if a config file has YAML aliases: a few lines can grow huge."""
    for flag, path in zip(arguments, arguments[1:], strict=False):
        if flag != "--config" or not os.path.isfile(path):
            continue
        with open(path, encoding="utf-8") as file:
            try:
                tokens = list(yaml.scan(file))
            except UnicodeDecodeError as error:
                raise UserError(f"{path} is not UTF-8: {error}.") from error
            except yaml.YAMLError:
                continue  # The parser reports the error.
        if any(isinstance(token, yaml.AliasToken) for token in tokens):
            raise UserError(
                f"{path} has YAML aliases (*name), which a config has no use "
                "for. Write the values out."
            )


def _normal(arguments: list[str]) -> list[str]:
    """Move `--config` first, so that flags win, and expand bare switches."""
    switches = {
        field.name
        for field in dataclasses.fields(DPOConfig)
        if field.type in (bool, bool | None)
    }
    first: list[str] = []
    rest: list[str] = []
    position = 0
    arguments = [part for x in arguments for part in _config_apart(x)]
    while position < len(arguments):
        argument = arguments[position]
        following = arguments[position + 1 : position + 2]
        if argument == "--config" and following:
            first += [argument, *following]
            position += 2
            continue
        rest.append(argument)
        name = argument[2:] if argument.startswith("--") else ""
        if name in switches:
            bare = not following or following[0].startswith("--")
            rest.append("true" if bare else following[0].lower())
            position += 0 if bare else 1
        position += 1
    return [*rest[:1], *first, *rest[1:]]


def _config_apart(argument: str) -> list[str]:
    """Split `--config=FILE`, possibly abbreviated, into two arguments."""
    flag, equals, path = argument.partition("=")
    if len(flag) <= len("--co") or not "--config".startswith(flag):
        return [argument]
    return ["--config", path] if equals else ["--config"]


def _make_parser() -> tuple[Any, dict[str, Callable[..., None]]]:
    parser = jsonargparse.ArgumentParser(
        prog="keras-dpo",
        description="Preference-tune language models with Keras on JAX.",
        exit_on_error=False,
        version=_version(),
    )
    commands = parser.add_subcommands(dest="subcommand")
    runners: dict[str, Callable[..., None]] = {}

    def add(
        name: str, run: Callable[..., None], about: str, build: Any
    ) -> None:
        command = jsonargparse.ArgumentParser(
            description=about,
            usage=f"keras-dpo {name} [options]",
            exit_on_error=False,
        )
        build(command)
        commands.add_subcommand(name, command, help=about)
        runners[name] = run

    add("train", run_train, "Preference-tune a policy.", _add_config)
    add("inspect", run_inspect, "Show what a dataset holds.", _add_inspect)
    add("precompute", run_precompute, "Store reference log-probs.", _add_config)
    add("plan", run_plan, "Predict memory and work of a step.", _add_config)
    add("evaluate", run_evaluate, "Measure a policy on pairs.", _add_config)
    add("generate", run_generate, "Answer prompts.", _add_generate)
    add("demo", run_demo, "A two-minute demo, offline.", _add_demo)
    return parser, runners


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("keras-dpo")
    except PackageNotFoundError:
        return "not installed"


def setting_help(docstring: str | None = DPOConfig.__doc__) -> dict[str, str]:
    """Map each setting to its description in `DPOConfig`'s docstring.

    Python 3.13 strips a docstring's indentation, and -OO strips docstrings.
    """
    parsed = docstring_parser.parse(docstring or "")
    return {
        setting.arg_name: re.sub(
            r"\s+", " ", setting.description or ""
        ).replace("%", "%%")
        for setting in parsed.params
    }


def _add_config(parser: Any) -> None:
    """Add every setting of `DPOConfig` as a flag, in groups."""
    parser.add_argument(
        "--config", action="config", help="A YAML file; flags win over it."
    )
    types = typing.get_type_hints(DPOConfig)
    about = setting_help()
    group = parser
    titles = {first: title for title, first in GROUPS.items()}
    for field in dataclasses.fields(DPOConfig):
        if field.name in titles:
            group = parser.add_argument_group(titles[field.name])
        group.add_argument(
            f"--{field.name}",
            type=types[field.name],
            default=field.default,
            help=about.get(field.name),
        )


def _add_inspect(parser: Any) -> None:
    _add_config(parser)
    parser.add_argument(
        "--show", type=int, default=2, help="Pairs to show in colour."
    )


def _add_generate(parser: Any) -> None:
    parser.add_argument("--repo_id", type=str, help="The policy.")
    parser.add_argument(
        "--prompt", type=str, nargs="+", help="One or more prompts."
    )
    parser.add_argument(
        "--raw",
        type=bool,
        default=False,
        help="Feed the prompt as it is, without the chat template.",
    )
    parser.add_argument("--max_new_tokens", type=int, default=128)
    parser.add_argument(
        "--sampler", type=str, default="greedy", help="A Keras-Hub sampler."
    )


def _add_demo(parser: Any) -> None:
    parser.add_argument("--save_directory", type=str, default="keras_dpo_demo")
    parser.add_argument("--seed", type=int, default=0)


def run_train(**options: Any) -> None:
    """Run `keras-dpo train`."""
    from keras_dpo.runs.train import train

    train(DPOConfig(**options))


def run_precompute(**options: Any) -> None:
    """Run `keras-dpo precompute`: print the stores' directories."""
    from keras_dpo.runs.train import precompute

    for directory in precompute(DPOConfig(**options)):
        say(str(directory))


def run_plan(**options: Any) -> None:
    """Run `keras-dpo plan`, which neither trains nor reads weights."""
    from keras_dpo.runs.plan import plan

    for line in plan(DPOConfig(**options)).lines():
        say(line)


def run_inspect(show: int, **options: Any) -> None:
    """Run `keras-dpo inspect`: print an audit and pairs as the model sees."""
    from keras_dpo.data.audit import audit, render_pair
    from keras_dpo.data.packing import Packing
    from keras_dpo.runs.build import (
        make_datasets,
        make_preprocessor_alone,
        require,
    )

    # Read all pairs, even of a dataset that training streams.
    config = DPOConfig(**{**options, "streaming": False})
    require(config, "dataset_name")
    preprocessor = make_preprocessor_alone(config)
    dataset, validation = make_datasets(config, preprocessor, verbose=False)
    result = audit(dataset, validation)
    result.lines.append(dataset.packed(Packing()).describe_rows())
    for line in result.lines:
        say(line)
    for title, histogram in (
        ("Prompt tokens", result.prompt_histogram),
        ("Completion tokens", result.completion_histogram),
    ):
        say(title)
        most = max(count for _, count in histogram) or 1
        for bound, count in histogram:
            bar = "#" * round(40 * count / most)
            say(f"  <= {bound:>6} {count:>7} {bar}")
    for index in range(min(show, dataset.num_pairs)):
        say(f"Row {dataset.report.rows[index]}:")
        say(render_pair(dataset, index))


def run_evaluate(**options: Any) -> None:
    """Run `keras-dpo evaluate`: print the metrics as one JSON object."""
    from keras_dpo.runs.train import evaluate

    say(json.dumps(evaluate(DPOConfig(**options)), indent=2))


def run_generate(
    repo_id: str | None,
    prompt: list[str] | None,
    raw: bool,
    max_new_tokens: int,
    sampler: str,
) -> None:
    """Run `keras-dpo generate`."""
    from keras_dpo.data.preprocessor import DPOPreprocessor
    from keras_dpo.policies.generation import generate
    from keras_dpo.policies.presets import load_policy

    if not repo_id or not prompt:
        raise UserError("`repo_id` and `prompt` are needed.")
    policy = load_policy(repo_id)
    preprocessor = DPOPreprocessor.from_policy(policy)
    prompts: list[Any] = list(prompt)
    if preprocessor.has_template() and not raw:
        prompts = [[{"role": "user", "content": text}] for text in prompts]
    for answer in generate(
        policy, preprocessor, prompts, max_new_tokens, sampler
    ):
        say(answer)


def run_demo(save_directory: str, seed: int) -> None:
    """Run `keras-dpo demo`."""
    from keras_dpo.runs import demo

    demo.run_demo(save_directory, seed)
