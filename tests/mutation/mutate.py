"""Breaks the core in random places, one at a time, and sees which test tells.

    python tests/mutation/mutate.py --number 40 --seed 0

Prints a line for every mutant; those that survive are listed again at the
end, each with its place and what was changed. A survivor is a missing test, or
a change that no behaviour depends on: read it and decide.
"""

import argparse
import ast
import copy
import pathlib
import random
import shutil
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).parents[2]
# Module -> the test files that hold it, the quickest first.
TARGETS = {
    "data/packing.py": ["test_packing", "test_packed_backbone"],
    "data/order.py": ["test_packing", "test_preprocessor", "test_pairs"],
    "data/layouts.py": ["test_records", "test_conversations"],
    "data/records.py": ["test_records"],
    "data/preprocessor.py": ["test_preprocessor", "test_conversations"],
    "references/precompute.py": ["test_reference_store", "test_sequences"],
    "references/store.py": ["test_reference_store", "test_sequences"],
    "references/initial_weights.py": ["test_sequences"],
    "training/state.py": ["test_training_backup"],
    "scoring/vocabulary_head.py": ["test_vocabulary_head", "test_log_probs"],
}
COMPARISONS = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
}
OPERATIONS = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Add,
    ast.FloorDiv: ast.Mult,
    ast.Div: ast.Mult,
    ast.Mod: ast.FloorDiv,
}


def ways(node):
    """Functions that each break a node in place, with their names."""
    found = []
    if isinstance(node, ast.Compare) and type(node.ops[0]) in COMPARISONS:
        other = COMPARISONS[type(node.ops[0])]
        found.append(
            (f"comparison -> {other.__name__}",
             lambda n: n.ops.__setitem__(0, other()))
        )  # fmt: skip
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATIONS:
        other_op = OPERATIONS[type(node.op)]
        found.append(
            (f"operator -> {other_op.__name__}",
             lambda n: setattr(n, "op", other_op()))
        )  # fmt: skip
    if isinstance(node, ast.Constant) and type(node.value) is int:
        for step in (1, -1):
            found.append(
                (f"{node.value} -> {node.value + step}",
                 lambda n, s=step: setattr(n, "value", n.value + s))
            )  # fmt: skip
    if isinstance(node, ast.Call) and len(node.args) >= 2:
        if not any(isinstance(a, ast.Starred) for a in node.args[:2]):
            found.append(
                ("first two arguments swapped",
                 lambda n: n.args.__setitem__(slice(0, 2), n.args[1::-1]))
            )  # fmt: skip
    if isinstance(node, ast.BoolOp):
        found.append(
            ("and <-> or",
             lambda n: setattr(
                 n, "op",
                 ast.Or() if isinstance(n.op, ast.And) else ast.And()))
        )  # fmt: skip
    if isinstance(node, ast.UnaryOp) and isinstance(
        node.op, ast.Not | ast.USub
    ):
        found.append(
            ("sign or not removed", lambda n: setattr(n, "op", ast.UAdd()))
        )
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        found[-1] = (
            "not not",
            lambda n: setattr(n, "operand", ast.UnaryOp(ast.Not(), n.operand)),
        )
    if isinstance(node, ast.If | ast.IfExp):
        found.append(
            ("condition turned round",
             lambda n: setattr(n, "test", ast.UnaryOp(ast.Not(), n.test)))
        )  # fmt: skip
    return found


def removable(tree):
    """(body, index) of the statements that may be left out."""
    for node in ast.walk(tree):
        for name in ("body", "orelse"):
            body = getattr(node, name, None)
            if not isinstance(body, list) or len(body) < 2:
                continue
            for index, statement in enumerate(body):
                call = isinstance(statement, ast.Expr) and isinstance(
                    statement.value, ast.Call
                )
                if call or isinstance(statement, ast.AugAssign):
                    yield body, index


def in_functions(tree):
    """Nodes inside function bodies, outside of messages of errors."""
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef):
            yield from _without_raises(function.body)


def _without_raises(nodes):
    for node in nodes:
        if isinstance(node, ast.Raise | ast.FunctionDef | ast.JoinedStr):
            continue
        yield node
        yield from _without_raises(ast.iter_child_nodes(node))


def mutants(source):
    """(line, what was done, new source) of every way to break a module."""
    tree = ast.parse(source)
    places = [
        (index, way)
        for index, node in enumerate(in_functions(tree))
        for way in range(len(ways(node)))
    ]
    for index, way in places:
        broken = copy.deepcopy(tree)
        node = list(in_functions(broken))[index]
        what, break_it = ways(node)[way]
        line = getattr(node, "lineno", 0)
        break_it(node)
        yield line, what, broken
    for number in range(len(list(removable(tree)))):
        broken = copy.deepcopy(tree)
        body, index = list(removable(broken))[number]
        line = body[index].lineno
        body[index] = ast.copy_location(ast.Pass(), body[index])
        yield line, "statement removed", broken


def is_told(directory, tests, timeout):
    """Whether a test fails (or never ends) on the broken copy."""
    for name in tests:
        path = directory / "tests" / f"{name}.py"
        if not path.exists():
            continue
        command = [
            sys.executable, "-m", "pytest", "-x", "-q",
            "-p", "no:cacheprovider", str(path),
        ]  # fmt: skip
        try:
            done = subprocess.run(
                command,
                cwd=directory,
                env=environment(directory),
                capture_output=True,
                timeout=timeout,
            )
        except subprocess.TimeoutExpired:
            return f"{name} never ends"
        if done.returncode:
            return name
    return None


def environment(directory):
    import os

    path = f"{directory}{os.pathsep}{directory / 'tests'}"
    return {**os.environ, "PYTHONPATH": path}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--number", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timeout", type=int, default=900, help="s a file")
    parser.add_argument("--modules", nargs="*", default=list(TARGETS))
    arguments = parser.parse_args()
    chance = random.Random(arguments.seed)
    survivors = []
    with tempfile.TemporaryDirectory() as scratch:
        directory = pathlib.Path(scratch) / "project"
        shutil.copytree(
            ROOT, directory, ignore=shutil.ignore_patterns(".git", "*cache*")
        )
        shared = ROOT.parent / "shared"
        if shared.exists():
            (pathlib.Path(scratch) / "shared").symlink_to(shared.resolve())
        for module in arguments.modules:
            # A test that fails anyway would tell of everything.
            failed = is_told(directory, TARGETS[module], arguments.timeout)
            if failed:
                sys.exit(f"{failed} fails on the unbroken {module}")
        for number in range(arguments.number):
            module = arguments.modules[number % len(arguments.modules)]
            path = directory / "keras_dpo" / module
            source = path.read_text()
            line, what, tree = chance.choice(list(mutants(source)))
            text = source.splitlines()[line - 1].strip()
            path.write_text(ast.unparse(ast.fix_missing_locations(tree)))
            begun = time.monotonic()
            told = is_told(directory, TARGETS[module], arguments.timeout)
            path.write_text(source)
            row = f"{module}:{line}: {what}: {text}"
            seconds = time.monotonic() - begun
            print(
                f"{told or 'SURVIVED':24} {seconds:4.0f} s  {row}", flush=True
            )
            if told is None:
                survivors.append(row)
    print(f"{len(survivors)} of {arguments.number} survived")
    for row in survivors:
        print(f"  {row}")


if __name__ == "__main__":
    main()
