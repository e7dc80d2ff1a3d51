"""A person's mistake is one message on stderr and an exit code: no traceback, no output, nothing written."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from orchestrator import cli
from orchestrator.plan import planned
from orchestrator.spec import load_spec
from storage.store import Store
from tests import rows, specs

SPEC = """\
name: mine
grid:
  model: lenet5_mini
  dataset: synthetic
  layers: conv1
  ratio: 0.2
dense: {epochs: 1, batch_size: 64, lr: 0.1}
retrain: {epochs: 1, batch_size: 64, lr: 0.1}
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def results(here: Path) -> Path:
    """A working directory with a store: the sweep `made`, two of its three candidates done."""
    document = specs.document(candidates={"mode": "sample", "count": 3})
    store = Store(here / "results")
    store.write_manifest("made", document.text(), planned(load_spec(document), document))
    tasks = specs.tasks(document)[:2]
    measured = [{"pruned_train_loss": float(i), "best_test_accuracy": 1.0 - i / 4} for i in range(2)]
    store.commit_rows("made", [rows.done(task, **m) for task, m in zip(tasks, measured, strict=True)])
    return here


def run(*arguments: str) -> int:
    """The exit code of `prunesweep ARGUMENTS`, run in this process."""
    with pytest.raises(SystemExit) as ended:
        cli.main(list(arguments))
    assert isinstance(ended.value.code, int)
    return ended.value.code


def refused(capsys: pytest.CaptureFixture[str], code: int, *arguments: str) -> str:
    """The one message with which `prunesweep ARGUMENTS` ends, having done nothing."""
    before = rows.tree(Path.cwd())
    assert run(*arguments) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    messages = [line for line in err.splitlines() if line.startswith(("prunesweep: ", "Error: "))]
    assert len(messages) == 1, err
    assert rows.tree(Path.cwd()) == before
    return err


# The arguments, the exit code, and what the message says.
IN_AN_EMPTY_FOLDER = [
    ("", 2, "prunesweep run digits"),
    ("rnu digits", 2, "No such command 'rnu'. Did you mean run?"),
    ("--nonsense", 2, "No such option"),
    ("run", 2, "Missing argument 'SPEC'"),
    ("run nosuch", 2, "nosuch is neither a file nor a study; `prunesweep studies` lists the studies"),
    ("run nosuch.yaml --inline", 2, "nosuch.yaml is neither a file nor a study"),
    ("run .", 2, ". is neither a file nor a study"),
    ("plan digit", 2, "did you mean digits?"),
    ("plan " + "x" * 300, 2, "cannot read xxx"),
    ("submit digts --address http://127.0.0.1:1", 2, "did you mean digits?"),
    ("plan digits --set grid.modle=lenet5", 2, "grid.modle: unknown key; allowed: model"),
    ("run digits --set grid.model=lenet5_mni", 2, "did you mean lenet5_mini?"),
    ("run digits --set grid.ratio", 2, "write it as key=value"),
    ("submit digits --set grid.model=lenet5_mni", 2, "did you mean lenet5_mini?"),
    ("plan digits --sett x=1", 2, "No such option"),
    ("run lenet5-mini-conv1 --data-root nowhere", 2, "prunesweep prefetch mnist --data-root"),
    ("submit digits", 2, "--address http://HOST:8265"),
    ("logs digits", 2, "--address http://HOST:8265"),
    ("submit digits --address head:6379", 2, "head:6379 is no job server: give --address http://HOST:8265"),
    ("submit digits --env 1=2 --address http://127.0.0.1:1", 2, "--env: write it as KEY=VALUE"),
    ("submit digits --submission-id a/b --address http://127.0.0.1:1", 2, "letters, digits, '.', '_' and '-'"),
    ("run digits --address http://head:8265", 2, "http://head:8265 is a job server: `prunesweep submit`"),
    ("run digits --inline --track wandb", 2, "--track goes through Ray: leave out --inline"),
    ("plan digits --set grid.pruner=nosuch:importance", 2, "there is no Python module nosuch"),
    ("plan digits --set dense.weights=library", 2, "dense.weights: lenet5_mini has no weights 'library'; give a file"),
    ("plan digits --set grid.dataset=imagefolder:nosuch --preflight", 2, "no folder"),
    (
        "plan digits --set grid.pruner=l1 --set grid.scope=global --set grid.layers=[[conv1,conv2]] "
        "--set grid.ratio=0.95",
        2,
        "together 19 are removed, which leaves none in one of 2 layers",
    ),
    ("prefetch", 2, "Missing argument"),
    ("prefetch mnst", 2, "unknown name 'mnst'; allowed: digits, mnist, fmnist, kmnist, synthetic, "),
    ("prefetch digits cifar11", 2, "unknown name 'cifar11'"),
    ("studies digit", 2, "no study digit; there are: digits, lenet5-mini-conv1"),
    ("plan digits -f xml", 2, "'xml' is not one of 'table', 'json'"),
    ("plan digits -o nowhere/plan.csv", 2, "cannot write nowhere/plan.csv: there is no folder nowhere"),
    ("run digits -o nowhere/table.csv", 2, "cannot write nowhere/table.csv: there is no folder nowhere"),
    ("ls", 5, "no store at results: nothing was run there yet (--store or PRUNESWEEP_STORE)"),
    ("status digits", 5, "no store at results"),
    ("query 1 --store elsewhere", 5, "no store at elsewhere"),
    ("query", 2, "give the SQL, or --file FILE"),
    ("query 1 --file nowhere.sql", 2, "'nowhere.sql' does not exist"),
    ("corr digits", 5, "no store at results"),
    ("plot digits", 5, "no store at results"),
    ("plot digits -o digits.jpeg", 2, "digits.jpeg: allowed are .png, .pdf, .svg"),
    ("plot digits -o digits", 2, "digits: allowed are .png, .pdf, .svg"),
    ("resume digits", 5, "no store at results"),
    ("stop digits", 5, "no store at results"),
    ("ls --store nothing://here", 5, "nothing://here is no store location"),
]


@pytest.mark.parametrize(
    ("arguments", "code", "told"), IN_AN_EMPTY_FOLDER, ids=[a[:60] for a, *_ in IN_AN_EMPTY_FOLDER]
)
def test_mistakes_in_an_empty_folder(
    here: Path, capsys: pytest.CaptureFixture[str], arguments: str, code: int, told: str
) -> None:
    """What cannot be done is told in one message that says what can, and leaves the folder empty."""
    if arguments:
        assert told in refused(capsys, code, *arguments.split())
    else:
        assert run() == code
        assert told in capsys.readouterr().err
    assert list(here.iterdir()) == []


def test_a_store_that_cannot_be_written(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A store below a regular file is refused before anything runs, with the store's own exit code."""
    (here / "file").write_text("not a folder")
    assert f"{here}/file is a file: a store is a folder" in refused(capsys, 5, "run", "digits", "--store", "file/x")


def test_cells_that_read_alike_are_told_apart(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two recipes make two cells of the same words: each line of the plan has its cell's id then."""
    two = "retrain=[{epochs: 1, batch_size: 64, lr: 0.1}, {epochs: 2, batch_size: 64, lr: 0.1}]"
    assert run("plan", "digits", "--set", two, "-f", "csv") == 0
    names = [line.split(",")[0] for line in capsys.readouterr().out.splitlines()[1:]]
    assert len(set(names)) == 2 and all(name.startswith("lenet5_mini digits conv1 0.2 oracle [") for name in names)


def test_a_plan_needs_no_data(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A cluster's sweep can be planned on a laptop: missing data is a warning, and nothing is written."""
    assert run("plan", "lenet5-mini-conv1", "--data-root", "nowhere") == 0
    out, err = capsys.readouterr()
    assert "lenet5_mini mnist conv1 0.5 oracle" in out
    assert "warning: the data set mnist is not under" in err and "3006 tasks in 7 cells" in err
    assert list(here.iterdir()) == []


@pytest.mark.parametrize("command", ["ls", "status made", "corr made", "plot made", "resume made", "stop made"])
def test_a_store_that_cannot_be_read(here: Path, capsys: pytest.CaptureFixture[str], command: str) -> None:
    """A location that is no folder is no store."""
    (here / "file").write_text("not a folder")
    assert "no store at file/x" in refused(capsys, 5, *command.split(), "--store", "file/x")


def test_a_spec_with_mistakes(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each mistake of a spec is told with its place, by every command that reads one."""
    (here / "mine.yaml").write_text(SPEC.replace("lenet5_mini", "lenet5_mni").replace("ratio", "ration"))
    for command in ("run", "plan", "submit"):
        told = refused(capsys, 2, command, "mine.yaml")
        assert told.startswith("prunesweep: mine.yaml:3:3: grid.model: unknown model 'lenet5_mni'")
        assert "\nmine.yaml:6:3: grid.ration: unknown key; " in told


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"name: [a\n", b"name: \0", b"", b"just words\n"])
def test_a_spec_that_is_none(here: Path, capsys: pytest.CaptureFixture[str], content: bytes) -> None:
    """A file of another kind is told to be one."""
    (here / "mine.yaml").write_bytes(content)
    assert "mine.yaml" in refused(capsys, 2, "plan", "mine.yaml")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("stor = 'elsewhere'\n", "prunesweep.toml: unknown key stor; allowed: store, data_root, address, job_server"),
        ("store = \n", "prunesweep.toml: not valid TOML"),
        ("store = 3\n", "prunesweep.toml: store is text"),
        ("[store]\nlocation = 'x'\n", "prunesweep.toml: store is text"),
        ("data_root = ''\n", "prunesweep.toml: data_root is text"),
    ],
)
def test_a_project_file_with_a_mistake(here: Path, capsys: pytest.CaptureFixture[str], content: str, told: str) -> None:
    """A project file that does not say what its author means stops every command."""
    (here / "prunesweep.toml").write_text(content)
    for command in ("ls", "plan digits", "prefetch digits"):
        assert told in refused(capsys, 2, *command.split())


def test_where_a_setting_comes_from(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command line beats the environment, which beats the project file, which beats the default."""
    assert "no store at results:" in refused(capsys, 5, "ls")
    (here / "prunesweep.toml").write_text("store = 'from-file'\n")
    assert "no store at from-file:" in refused(capsys, 5, "ls")
    monkeypatch.setenv("PRUNESWEEP_STORE", "from-environment")
    assert "no store at from-environment:" in refused(capsys, 5, "ls")
    assert "no store at from-flag:" in refused(capsys, 5, "ls", "--store", "from-flag")


@pytest.mark.parametrize(
    ("sql", "told"),
    [
        ("selec 1", "syntax error"),
        ("", "exactly one SELECT"),
        ("select 1; select 2", "exactly one SELECT"),
        ("drop view rows", "exactly one SELECT"),
        ("copy (select 1) to 'out.csv'", "exactly one SELECT"),
        ("attach 'out.db'", "exactly one SELECT"),
        ("create table mine as select 1", "exactly one SELECT"),
        ("set threads = 1", "exactly one SELECT"),
        ("select * from nosuch", "nosuch"),
        ("select nosuch from rows", "nosuch"),
        ("select * from 'mine.csv'", "mine.csv"),
    ],
)
def test_bad_sql(results: Path, capsys: pytest.CaptureFixture[str], sql: str, told: str) -> None:
    """A query is one SELECT over the views; anything else is told apart and changes nothing."""
    (results / "mine.csv").write_text("a\n1\n")
    assert told in refused(capsys, 2, "query", sql)
    (results / "mine.sql").write_text(sql)
    assert told in refused(capsys, 2, "query", "--file", "mine.sql")


def test_a_query_file_that_is_no_text(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A binary file given for SQL is a mistake, not an internal error."""
    (results / "mine.sql").write_bytes(b"\xff\xfe\x00")
    assert "cannot read mine.sql" in refused(capsys, 2, "query", "--file", "mine.sql")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("status", "nosuch"), "no sweep nosuch in results; there are: made"),
        (("resume", "nosuch"), "no sweep nosuch in results; there are: made"),
        (("corr", "nosuch"), "no sweep nosuch in results; there are: made"),
        (("plot", "nosuch"), "no sweep nosuch in results; there are: made"),
        (("resume", "made", "--no-wait"), "--no-wait is about a job: it needs --address http://HOST:8265"),
        (("stop", "nosuch"), "no run of nosuch is at work on this machine"),
        (("stop", "made"), "no run of made is at work on this machine"),
        (("corr", "made", "--y", "accuracy"), "accuracy is no number of a candidate; allowed: "),
        (("corr", "made", "--where", "nosuch > 1"), "nosuch"),
        (("corr", "made", "--where", "true); drop view rows; --"), "--where: "),
        (("corr", "made", "--where", "true); drop view rows; select (1"), "--where: a query is exactly one SELECT"),
        (("plot", "made", "--x", "nosuch"), "nosuch is no number of a candidate"),
        (("plot", "made", "--where", "candidate = 0"), "no cell with two finished candidates"),
        (("plot", "made", "-o", "nowhere/made.png"), "cannot write nowhere/made.png"),
        (("resume", "made", "--where", "nosuch > 1"), "nosuch"),
        (
            ("resume", "made", "--shard", "nosuch"),
            "shard nosuch; `prunesweep status made --by shard`",
        ),
        (("status", "made", "--by", "seed"), "'seed' is not one of 'cell', 'shard'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_mistakes_about_a_sweep(
    results: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], told: str
) -> None:
    """An unknown sweep, column, shard or condition is told with those there are."""
    assert told in refused(capsys, 2, *arguments)


def test_parquet_is_for_files_and_pipes(
    here: Path, capsysbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """-f parquet on a terminal is refused before the work is done; a pipe and a file get it."""
    assert run("plan", "digits", "-f", "parquet") == 0
    assert capsysbinary.readouterr().out[:4] == b"PAR1"
    assert run("plan", "digits", "-f", "parquet", "-o", "plan.parquet") == 0
    assert capsysbinary.readouterr().out == b""
    assert pq.read_table(here / "plan.parquet")["tasks"].to_pylist() == [90]
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr("orchestrator.plan.check", lambda *_: pytest.fail("the plan was made all the same"))
    assert run("plan", "digits", "-f", "parquet") == 2
    out, err = capsysbinary.readouterr()
    assert (out, b"-f parquet needs -o FILE (or a pipe)" in err) == (b"", True)


def test_plan_writes_nothing(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`plan` says what would run, on stdout, and leaves no store behind."""
    assert run("plan", "digits", "-f", "csv") == 0
    out, err = capsys.readouterr()
    assert out.splitlines() == [
        "cell,candidates,seeds,tasks,done,failed,new",
        "lenet5_mini digits conv1 0.2 oracle,45,2,90,0,0,90",
    ]
    assert "digits: 90 tasks in 1 cell: 0 done, 0 failed, 90 new" in err
    assert list(here.iterdir()) == []


def test_debug_shows_the_traceback(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--debug is how one sees where a message comes from; the exit code stays."""
    assert run("--debug", "plan", "nosuch") == 2
    assert "Traceback" in capsys.readouterr().err


def test_an_error_of_ours_is_called_one(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is no mistake of the person's exits 1, with the traceback to report."""
    monkeypatch.setattr("orchestrator.plan.check", lambda *_: 1 // 0)
    assert run("plan", "digits") == 1
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert "internal error, please report it: ZeroDivisionError" in err


def test_a_python_without_what_it_is_built_on(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the first one that a job finds on its node may be: one message that names it, and the cluster's exit code. A
    module of ours that is missing is an error of ours."""

    def missing(name: str) -> None:
        def check(*_: object) -> None:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

        monkeypatch.setattr("orchestrator.plan.check", check)

    missing("pyarrow.fs")
    assert run("plan", "digits") == 4
    err = capsys.readouterr().err
    assert f"{sys.executable} has no pyarrow.fs, which prunesweep is built on" in err and "Traceback" not in err
    missing("storage.nosuch")
    assert run("plan", "digits") == 1
    assert "internal error" in capsys.readouterr().err
    bare = subprocess.run(
        [sys.executable, "-S", "-m", "prunesweep"], capture_output=True, text=True, cwd=Path(__file__).parents[1]
    )
    assert bare.returncode == 4 and "has no click" in bare.stderr and "Traceback" not in bare.stderr


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_shows_an_example(here: Path, capsys: pytest.CaptureFixture[str], command: str) -> None:
    """Every command's help has a line to copy, and the list of commands says what each is for."""
    assert run(command, "--help") == 0
    text = capsys.readouterr().out
    assert any(line.strip().startswith(f"prunesweep {command}") for line in text.splitlines())
    assert run("--help") == 0
    assert any(line.split()[:1] == [command] and cli.HELP[command][:20] in line for line in lines(capsys))


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What was printed, by line."""
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(
    "arguments",
    [
        "--help",
        "ls",
        "status made",
        "query from<rows",
        "corr made",
        "plan digits",
        "plan digits --set grid.model=resnet20 --set grid.layers=layer1.0.conv1",
        "plan digits --set dense.batch_size=4",
        "plot made -o f.svg",
    ],
)
def test_reading_needs_neither_torch_nor_ray(results: Path, arguments: str) -> None:
    """What only reads answers at once, also where torch or ray is broken or slow to import."""
    words = [word.replace("<", " ") for word in arguments.split()]
    found = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "prunesweep", *words], capture_output=True, text=True, cwd=results
    )
    assert found.returncode == 0, found.stderr[-2000:]
    assert found.stdout
    modules = {line.split("|")[-1].strip() for line in found.stderr.splitlines() if line.startswith("import time:")}
    assert "orchestrator.cli" in modules
    assert {module.split(".")[0] for module in modules} & {"torch", "torchvision", "ray", "accelerate"} == set()
    if arguments == "--help" or arguments.startswith(("status", "query")):  # half a second each
        assert {"pandas", "scipy.stats", "tenacity"} & modules == set()


def test_no_command_needs_torch_or_ray_for_its_help() -> None:
    """Help and the checks before the work are there without waiting for torch."""
    code = "import sys; from orchestrator.cli import COMMANDS, command_line as c; "
    code += "[c.get_command(None, name) for name in COMMANDS]; "
    code += "sys.exit(str({'torch', 'ray', 'accelerate'} & set(sys.modules) or '') or 0)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (found.returncode, found.stderr) == (0, "")
