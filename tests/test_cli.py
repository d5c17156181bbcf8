"""The command `colonnade`: its commands, what it refuses by name, and what it imports."""

import subprocess
import sys
from pathlib import Path

import pytest

import colonnade
from colonnade import cli
from colonnade.completion import SHELLS

ROOT = Path(__file__).parent.parent
NOT_BUILT = ("plan", "simulate", "report", "doctor")


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Return what is printed about arguments that end the process with code 2."""
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    return shown.err


@pytest.mark.parametrize("name", [name for name in NOT_BUILT if not (ROOT / f"colonnade/{name}.py").exists()])
def test_a_command_that_is_not_built_is_refused_by_name(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"error: {name!r} is not built yet. Available: train, check, " in refusal(capsys, name, "--config", "x.py")


def test_an_unknown_command_is_answered_with_the_nearest_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert "error: unknown command 'trian'. Did you mean 'train'?" in refusal(capsys, "trian")
    assert "error: unknown command 'x'. Available: train, check, " in refusal(capsys, "x")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("train", "--world", "4"), "usage: colonnade train [-h]"),
        (("train", "--world", "4"), "colonnade train: error: --world is for --check alone"),
        (("train", "--check", "--profile", "1:2"), "error: --profile is for a run"),
        (("check", "--nprocs", "4"), "usage: colonnade check [-h]"),
        (("check", "--nprocs", "4"), "colonnade check: error: unrecognized arguments: --nprocs 4"),
        (("export", "runs/x"), "colonnade export: error: the following arguments are required: --to"),
        (("export", "runs/x", "--to", "hf", "--dtype", "int8"), "invalid choice: 'int8'"),
    ],
)
def test_arguments_of_a_command_that_make_no_sense_are_refused(
    arguments: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert words in refusal(capsys, *arguments)


def test_only_rank_zero_prints_what_is_wrong_with_a_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert refusal(capsys, "plan") == ""


def test_without_a_command_the_help_is_printed_and_the_code_is_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    assert capsys.readouterr().err.startswith("usage: colonnade")


def test_check_prints_what_train_check_prints(capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--world", "2", "--set", "train.steps=7", "parallel.pipeline=2")
    shown = []
    for command in (("train", "--check"), ("check",)):
        assert cli.main([*command, *options]) == 0
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1]
    assert "2 ranks = pipe 2" in shown[0]


# -- imports -----------------------------------------------------------------------------------------------------------

IMPORTED = """
import sys
from colonnade import cli
try:
    code = cli.main(sys.argv[1:])
except SystemExit as ended:
    code = ended.code or 0
heavy = {"torch", "numpy", "rich", "transformers", "parallel", "models", "training"} & set(sys.modules)
print(code, sorted(heavy))
"""


def python(*arguments: str) -> str:
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stderr + done.stdout


@pytest.mark.parametrize(
    ("code", "arguments"),
    [
        (0, ["--version"]),
        (0, ["--help"]),
        (0, ["train", "--help"]),
        (0, ["timeline", "--help"]),
        (0, ["--print-completion", "bash"]),
        (2, ["plan"]),
        (2, ["train", "--steps", "3"]),
    ],
)
def test_what_needs_no_torch_imports_none_and_no_package_of_ours(code: int, arguments: list[str]) -> None:
    assert python("-c", IMPORTED, *arguments).splitlines()[-1] == f"{code} []"


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"colonnade {colonnade.__version__}\n"


def test_another_package_of_the_same_name_that_came_first_is_named(tmp_path: Path) -> None:
    """The message was once that of Python: No module named 'models.shapes'."""
    (tmp_path / "models").mkdir()
    (tmp_path / "models/__init__.py").touch()
    program = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import models, colonnade"
    shown = python("-c", program).splitlines()[-1]
    assert shown.startswith(
        "ImportError: colonnade has a package 'models' of its own, but another one has been imported"
    )
    assert str(tmp_path / "models") in shown


def test_a_package_of_the_user_is_not_imported_for_ours(tmp_path: Path) -> None:
    """The folder of the user is searched first, as the working directory is by `python -m`."""
    for name in ("models", "training"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
    (tmp_path / "parallel.py").touch()
    program = f"""if True:
        import sys
        import colonnade
        sys.path.insert(0, {str(tmp_path)!r})
        from importlib.util import find_spec
        print(*(find_spec(name).origin for name in ("parallel", "models", "training")))
    """
    assert python("-c", program).split() == [
        str(ROOT / name / "__init__.py") for name in ("parallel", "models", "training")
    ]


def test_our_own_packages_that_came_first_are_no_problem() -> None:
    assert python("-c", "import training; import colonnade; print(training.__file__)").endswith(
        f"{ROOT / 'training/__init__.py'}\n"
    )


# -- completion --------------------------------------------------------------------------------------------------------

ASK_BASH = """
source /dev/stdin
COMP_WORDS=({words}); COMP_CWORD={last}
$(complete -p colonnade | sed 's/.*-F \\([^ ]*\\) .*/\\1/')
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


def completed(script: str, folder: Path, *words: str) -> list[str]:
    """Return what bash would complete the last of these words to."""
    quoted = " ".join(f"'{word}'" for word in words)
    ask = ASK_BASH.format(words=quoted, last=len(words) - 1)
    done = subprocess.run(
        ["bash", "--norc", "-c", ask], input=script, cwd=folder, capture_output=True, text=True, check=True
    )
    return done.stdout.split()


@pytest.mark.parametrize("shell", SHELLS)
def test_the_completion_of_every_shell_has_the_commands_and_options(
    shell: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """It completes `colonnade`, also when it was printed by `python -m colonnade`."""
    assert cli.main(["--print-completion", shell], program="python -m colonnade") == 0
    script = capsys.readouterr().out
    assert all(word in script for word in ("colonnade", "train", "export", "config", "nprocs", "dtype"))
    assert "python -m" not in script


def test_a_reader_of_the_completion_that_goes_early_is_no_error() -> None:
    """The script is longer than a pipe holds; `| head` once showed a traceback."""
    command = f"'{sys.executable}' -m colonnade --print-completion bash | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_bash_completes_commands_options_values_and_paths(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "my.py").touch()
    (tmp_path / "my_run").mkdir()
    assert cli.main(["--print-completion", "bash"]) == 0
    script = capsys.readouterr().out
    assert completed(script, tmp_path, "colonnade", "tr") == ["train"]
    assert completed(script, tmp_path, "colonnade", "train", "--conf") == ["--config"]
    assert "my.py" in completed(script, tmp_path, "colonnade", "train", "--config", "my")
    assert completed(script, tmp_path, "colonnade", "export", "my") == ["my_run"]
    assert completed(script, tmp_path, "colonnade", "export", "my_run", "--dtype", "bf") == ["bf16"]
