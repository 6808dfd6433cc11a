"""Experiment trackers get what log.jsonl gets: once, under the same names, without folders or text.

W&B and MLflow are tested as they are where they are installed (test_real_trackers.py), and
everywhere by stand-ins that keep what they are given and refuse what the real ones refuse.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import tempfile
import threading
import time
import traceback
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mlip.ranks import distributed
from mlip.settings.config import Config, ConfigError
from mlip.training import tracker_feed, trackers
from mlip.training.lifecycle import Preempted
from mlip.training.runlog import RunLog
from mlip.training.step import StepResult
from mlip.training.stop_request import StopRequest
from mlip.training.trackers import put_evaluation, settings_shown
from tests.training.toy_run import make_trainer, toy_config

STEP = {
    "total": 2.25,
    "grad_norm": 12.3456,
    "lr": 1e-3,
    "pairs_per_s": 26.67,
    "terms/global_contrastive": 1.5,
    "terms/own": 0.75,
    "scales/logit": 14.28,
    "scales/logit_local": 5.0,
}


class _Board:
    """As torch.utils.tensorboard.SummaryWriter."""

    opened: list[Any] = []

    def __init__(self, folder: str, purge_step: int | None = None) -> None:
        self.folder, self.purge_step, self.is_closed = folder, purge_step, False
        self.numbers: list[tuple[str, float, int]] = []
        _Board.opened.append(self)

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.numbers.append((name, value, step))

    def close(self) -> None:
        self.is_closed = True


class _Wandb(types.ModuleType):
    """As wandb: runs by id, and what `wandb.init` was given at each start."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.starts: list[dict[str, Any]] = []
        self.rows: dict[str, list[dict[str, Any]]] = {}
        self.summaries: dict[str, dict[str, Any]] = {}  # what was put there, not what rows left
        self.has_key, self.ends, self.axes = True, [], []
        self.unfinished: list[Any] = []
        self.fails: Callable[[dict[str, Any]], None] = lambda row: None

    @staticmethod
    def Settings(**given: Any) -> dict[str, Any]:
        if given["mode"] not in ("online", "offline"):
            raise ValueError("mode: Input should be 'online', 'offline', ...")
        return given

    def login(self, *, prompt: bool, verify: bool) -> bool:
        assert not prompt and verify  # a question would wait for an answer for ever
        return self.has_key

    def init(self, **given: Any) -> Any:
        self.starts.append(given)
        if self.unfinished and given["settings"].get("reinit") != "create_new":
            return self.unfinished[-1]  # of whatever name (seen with 0.31)
        rows = self.rows.setdefault(given["id"], [])
        is_known = given["settings"]["mode"] == "online" and bool(rows)

        summary = self.summaries[given["id"]] = dict(rows[-1]) if is_known else {}

        def log(row: dict[str, Any]) -> None:
            self.fails(row)
            rows.append(row)

        def finish(exit_code: int) -> None:
            self.ends.append(exit_code)
            self.unfinished.remove(run)

        run = types.SimpleNamespace(
            log=log,
            resumed=is_known,
            summary=summary,
            define_metric=lambda name, **more: self.axes.append((name, more)),
            finish=finish,
        )
        self.unfinished.append(run)
        return run


class _Mlflow:
    """As mlflow: a store by its address, whose runs outlive the clients."""

    def __init__(self) -> None:
        self.stores: dict[str, dict[str, Any]] = {}
        self.fails: Callable[[], None] = lambda: None
        mine = self

        class Client:
            def __init__(self, tracking_uri: str) -> None:
                self.store = mine.stores.setdefault(tracking_uri, {"names": {}, "runs": {}})

            def get_experiment_by_name(self, name: str) -> Any:
                found = self.store["names"].get(name)
                return found and types.SimpleNamespace(experiment_id=found)

            def create_experiment(self, name: str, artifact_location: str | None) -> str:
                self.store["place"] = artifact_location
                return str(self.store["names"].setdefault(name, f"e-{name}"))

            def create_run(self, experiment: str, run_name: str) -> Any:
                name = f"run{len(self.store['runs'])}"
                self.store["runs"][name] = {
                    **{"experiment": experiment, "name": run_name, "status": "RUNNING"},
                    **{"params": {}, "metrics": [], "stage": "active"},
                }
                return types.SimpleNamespace(info=types.SimpleNamespace(run_id=name))

            def get_run(self, name: str) -> Any:
                if name not in self.store["runs"]:
                    raise RuntimeError(f"Run '{name}' not found")
                run = self.store["runs"][name]
                latest: dict[str, Any] = {}
                for metric in sorted(run["metrics"], key=lambda metric: int(metric.step)):
                    latest[metric.key] = metric
                return types.SimpleNamespace(
                    info=types.SimpleNamespace(lifecycle_stage=run["stage"]),
                    data=types.SimpleNamespace(
                        params=dict(run["params"]),
                        to_proto=lambda: types.SimpleNamespace(metrics=list(latest.values())),
                    ),
                )

            def update_run(self, name: str, status: str) -> None:
                self.store["runs"][name]["status"] = status

            set_terminated = update_run

            def log_batch(
                self, name: str, metrics: Any = (), params: Any = (), synchronous: bool = True
            ) -> None:
                mine.fails()
                assert len(params) <= 100 and len(metrics) <= 1000 and synchronous
                run = self.store["runs"][name]
                for param in params:
                    assert len(param.value) <= 6000
                    assert run["params"].setdefault(param.key, param.value) == param.value
                for metric in metrics:
                    if not re.fullmatch(r"[\w\-. :/]+", metric.key):
                        raise ValueError(f"{metric.key}: names may only contain ...")
                    if metric not in run["metrics"]:
                        run["metrics"].append(metric)

        def entity(*names: str) -> Any:
            return lambda *given: types.SimpleNamespace(**dict(zip(names, given, strict=True)))

        self.modules = {
            "mlflow": types.ModuleType("mlflow"),
            "mlflow.tracking": types.SimpleNamespace(MlflowClient=Client),
            "mlflow.entities": types.SimpleNamespace(
                Metric=entity("key", "value", "timestamp", "step"), Param=entity("key", "value")
            ),
            **{name: types.ModuleType(name) for name in ("alembic", "sqlalchemy")},
        }

    def run(self, name: str = "run0") -> dict[str, Any]:
        (store,) = self.stores.values()
        found: dict[str, Any] = store["runs"][name]
        return found


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Without what this machine says to trackers, and what they are told in a test."""
    for name in [name for name in os.environ if name.startswith(("WANDB_", "MLFLOW_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(os, "environ", os.environ.copy())
    yield


@pytest.fixture
def board(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    monkeypatch.setattr(_Board, "opened", [])
    module = types.SimpleNamespace(SummaryWriter=_Board)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    return _Board.opened


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> _Wandb:
    module = _Wandb()
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


@pytest.fixture
def mlflow(monkeypatch: pytest.MonkeyPatch) -> _Mlflow:
    made = _Mlflow()
    for name, module in made.modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return made


@pytest.fixture
def warned(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> Callable[[], list[str]]:
    """What was said as a warning."""
    monkeypatch.setattr(logging.getLogger("mlip"), "handlers", [])
    monkeypatch.setattr(logging.getLogger("mlip"), "propagate", True)
    return lambda: [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]


def _log(folder: Path, *more: str, start_step: int = 0) -> RunLog:
    folder.mkdir(exist_ok=True)
    config = toy_config(f"run.dir={folder}", "batch.global_pairs=8", *more)
    return RunLog(config, total_steps=20, start_step=start_step)


def _steps(log: RunLog, *steps: int) -> None:
    for step in steps:
        result = StepResult(
            total=2.25,
            terms={"global_contrastive": 1.5, "own": 0.75},
            grad_norm=12.3456,
            is_skipped=False,
            stop_requested=False,
            scales={"logit": 14.28, "logit_local": 5.0},
        )
        log.step(step, result, lr=1e-3, epoch=0.1, step_seconds=0.3, wait_seconds=0.0)


def _val(log: RunLog, *steps: int) -> None:
    for step in steps:
        terms = {"total": 3.5, "recall@10 image to text": 0.25}
        log.validated(step, terms, pairs=8, best_step=step)


def _kill(log: RunLog) -> None:
    """As a kill -9 once all that was put has been handed over."""
    assert log._trackers is not None
    for feed in log._trackers._feeds:
        deadline = time.monotonic() + 10
        while feed._points and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not feed._points


def test_each_gets_every_number_under_the_same_name_and_step(
    tmp_path: Path, board: Any, wandb: Any, mlflow: Any
) -> None:
    log = _log(tmp_path, "train.tensorboard=true", "train.wandb=true", "train.mlflow=true")
    _val(log, 4)
    _steps(log, 5)
    log.close()
    of_val = {"val/total": 3.5, "val/recall@10 image to text": 0.25}
    (of_board,) = board
    assert of_board.folder == str(tmp_path / "tensorboard") and of_board.is_closed
    expected = [(n, v, 4) for n, v in of_val.items()] + [(n, v, 5) for n, v in STEP.items()]
    assert of_board.numbers == expected
    (rows,) = wandb.rows.values()
    assert rows == [{**of_val, "step": 4}, {**STEP, "step": 5}]
    # the axis of all others: W&B's own count is shifted by `wandb sync` of a resumed run
    assert wandb.axes == [("step", {}), ("*", {"step_metric": "step"})] and wandb.ends == [0]
    run = mlflow.run()
    assert [(m.key.replace("_at_", "@"), m.value, m.step) for m in run["metrics"]] == expected
    assert run["status"] == "FINISHED" and run["name"] == tmp_path.name
    now = time.time() * 1000
    assert all(now - 60_000 < metric.timestamp <= now for metric in run["metrics"])


def test_wandb_is_given_nothing_while_the_disk_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wandb: Any, warned: Any
) -> None:
    """Its process says nothing of a full disk, and its file takes no row any more (seen)."""
    monkeypatch.setattr(tracker_feed, "RETRY_S", 0.01)
    free = [1 << 20]
    told = types.SimpleNamespace(disk_usage=lambda path: (1 << 40, 0, free[0]))
    monkeypatch.setattr(trackers, "shutil", told)
    log = _log(tmp_path, "train.wandb=true")
    _steps(log, 1, 2)
    deadline = time.monotonic() + 10
    while not warned() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert wandb.rows == {wandb.starts[0]["id"]: []}
    free[0] = 1 << 30
    log.close()
    (rows,) = wandb.rows.values()
    assert [row["step"] for row in rows] == [1, 2]
    (text,) = warned()
    assert text.startswith("train.wandb: OSError: [Errno 28] No space left on device; training")


def test_wandb_is_written_to_on_a_disk_that_does_not_tell_its_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wandb: Any, warned: Any
) -> None:
    """A program's file system (FUSE) may say 0 bytes of 0."""
    told = types.SimpleNamespace(disk_usage=lambda path: (0, 0, 0))
    monkeypatch.setattr(trackers, "shutil", told)
    log = _log(tmp_path, "train.wandb=true")
    _steps(log, 1, 2)
    log.close()
    (rows,) = wandb.rows.values()
    assert [row["step"] for row in rows] == [1, 2] and not warned()


def test_tensorboard_goes_on_in_a_new_file_where_its_own_thread_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, board: Any
) -> None:
    """As SummaryWriter does after a full disk: it raises whatever it is given."""
    monkeypatch.setattr(tracker_feed, "RETRY_S", 0.01)
    log = _log(tmp_path, "train.tensorboard=true")
    (first,) = board
    del first.numbers
    _steps(log, 1, 2)
    deadline = time.monotonic() + 10
    while len(board) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    log.close()
    first, second = board
    assert (second.folder, second.purge_step) == (first.folder, None) and second.is_closed
    assert [step for name, _, step in second.numbers if name == "total"] == [1, 2]


def test_tensorboard_forgets_steps_that_are_trained_again(tmp_path: Path, board: Any) -> None:
    _log(tmp_path, "train.tensorboard=true", start_step=4).close()
    assert board[0].purge_step == 5  # steps from this one on that a killed run has left


@pytest.mark.parametrize("mode", ["offline", "online"])
def test_a_killed_run_goes_on_in_the_same_run_and_no_step_is_there_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wandb: Any, mlflow: Any, mode: str
) -> None:
    monkeypatch.setenv("WANDB_MODE", mode)
    settings = ("train.wandb=true", "train.mlflow=true")
    log = _log(tmp_path, *settings)
    _steps(log, 1, 2, 3, 4)
    _val(log, 4)
    _steps(log, 5, 6)  # of these there is no checkpoint
    _kill(log)
    log = _log(tmp_path, *settings, "train.log_steps=7", start_step=4)
    _val(log, 4)
    _steps(log, 5, 6, 7, 8)
    _val(log, 8)
    log.close("stopped")
    (rows,) = wandb.rows.values()
    assert [r["step"] for r in rows if "total" in r] == list(range(1, 9))
    assert [r["step"] for r in rows if "val/total" in r] == [4, 8]
    first, second = wandb.starts
    assert first["id"] == second["id"] and second["resume"] == "allow" and wandb.ends == [1]
    run = mlflow.run()
    assert [m.step for m in run["metrics"] if m.key == "total"] == list(range(1, 9))
    assert [m.step for m in run["metrics"] if m.key == "val/total"] == [4, 8]
    assert run["status"] == "KILLED"
    # MLflow changes no param; W&B's settings are those of the last start
    assert run["params"]["train.log_steps"] == "4"
    assert second["config"]["train"]["log_steps"] == 7
    kept = json.loads((tmp_path / "trackers.json").read_text())
    assert kept == {"wandb": first["id"], "mlflow": {"local": "run0"}}


@pytest.mark.parametrize("mode", ["offline", "online"])
def test_val_that_is_watched_later_is_there_beside_steps_that_were_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wandb: Any, mlflow: Any, mode: str
) -> None:
    monkeypatch.setenv("WANDB_MODE", mode)
    log = _log(tmp_path, "train.wandb=true", "train.mlflow=true")
    _steps(log, 1, 2, 3, 4, 5, 6)
    _kill(log)
    log = _log(tmp_path, "train.wandb=true", "train.mlflow=true", start_step=4)
    _val(log, 4)
    log.close()
    (rows,) = wandb.rows.values()
    assert [row["step"] for row in rows if "val/total" in row] == [4]
    assert [m.step for m in mlflow.run()["metrics"] if m.key == "val/total"] == [4]


def test_what_a_kill_kept_from_wandbs_server_is_written_to_it_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wandb: Any
) -> None:
    """It is sent every 15 s or so: the server says what it has, log.jsonl has more."""
    monkeypatch.setenv("WANDB_MODE", "online")
    log = _log(tmp_path, "train.wandb=true")
    _steps(log, 1, 2, 3, 4, 5, 6)
    _val(log, 6)
    _kill(log)
    (rows,) = wandb.rows.values()
    del rows[5:]
    log = _log(tmp_path, "train.wandb=true", start_step=4)
    _steps(log, 5, 6)
    _val(log, 6)
    _steps(log, 7)
    log.close()
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6, 6, 7]


def test_a_run_is_its_own_where_one_before_it_in_the_process_is_not_finished(
    tmp_path: Path, wandb: Any
) -> None:
    """W&B gives one that is still sent, to a server that is gone, to whoever asks for a new one."""
    for name in ("first", "second"):
        _steps(_log(tmp_path / name, "train.wandb=true"), 1, 2)
    deadline = time.monotonic() + 10
    wanted = {start["id"]: [1, 2] for start in wandb.starts}
    found: dict[str, list[int]] = {}
    while found != wanted and time.monotonic() < deadline:
        time.sleep(0.01)
        found = {name: [row["step"] for row in rows] for name, rows in wandb.rows.items()}
    assert found == wanted and len(found) == 2


def test_one_that_was_opened_goes_on_in_its_run_where_the_other_was_refused(
    tmp_path: Path, wandb: Any, mlflow: Any
) -> None:
    def refuse() -> None:
        raise ConnectionError("no route")

    mlflow.fails = refuse
    with pytest.raises(ConfigError, match=r"train\.mlflow=true .*no route"):
        _log(tmp_path, "train.wandb=true", "train.mlflow=true")
    mlflow.fails = lambda: None
    _log(tmp_path, "train.wandb=true", "train.mlflow=true").close()
    assert len(wandb.starts) == 2 and len(wandb.rows) == 1


@pytest.mark.parametrize("mode", ["offline", "online"])
def test_scores_of_the_evaluation_reach_the_run_that_the_training_wrote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, board: Any, wandb: Any, mlflow: Any, mode: str
) -> None:
    """They were in results.json alone. A step that was written is refused, these are not."""
    monkeypatch.setenv("WANDB_MODE", mode)
    log = _log(tmp_path, "train.tensorboard=true", "train.wandb=true", "train.mlflow=true")
    _steps(log, 1, 2, 3)
    log.close()
    scores = {"AUROC global": 0.75, "recall@10 image to text local": 0.5}
    for value in (0.5, 0.75):  # the same command again evaluates again; the best on val was step 2
        put_evaluation(log.config, 2, scores | {"AUROC global": value})
    named = {f"evaluation/{name}": value for name, value in scores.items()}
    (rows,) = wandb.rows.values()
    assert [row["step"] for row in rows] == [1, 2, 3] and wandb.ends == [0, 0, 0]
    told = [start["config"]["train"] for start in wandb.starts]  # W&B keeps those of the last
    assert all(one["tensorboard"] and one["wandb"] and one["mlflow"] for one in told)
    (summary,) = wandb.summaries.values()
    assert named.items() <= summary.items() and summary.get("step", 3) == 3
    run = mlflow.run()
    latest = {m.key.replace("_at_", "@"): (m.value, m.step) for m in run["metrics"]}
    assert {name: (value, 2) for name, value in named.items()}.items() <= latest.items()
    assert run["status"] == "FINISHED" and "total" in latest
    # TensorBoard shows no step from purge_step on
    assert [(b.purge_step, b.is_closed) for b in board] == [(1, True), (None, True), (None, True)]
    assert board[2].numbers == [(name, value, 2) for name, value in named.items()]


def test_a_tracker_that_is_gone_at_the_end_lacks_the_scores_and_ends_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    board: Any,
    wandb: Any,
    mlflow: Any,
    warned: Any,
) -> None:
    log = _log(tmp_path, "train.tensorboard=true", "train.wandb=true", "train.mlflow=true")
    log.close()
    mlflow.stores.clear()

    def refuse(*given: Any, **more: Any) -> None:
        raise PermissionError(13, "Permission denied", "tensorboard")

    monkeypatch.setattr(_Board, "__init__", refuse)  # as SummaryWriter in a folder of another's
    put_evaluation(log.config, 2, {"AUROC global": 0.75})
    (summary,) = wandb.summaries.values()
    assert summary == {"evaluation/AUROC global": 0.75}
    refused, text = warned()
    assert refused == (
        "the scores of the evaluation are not there: [Errno 13] Permission denied: 'tensorboard'"
    )
    assert text.startswith("the scores of the evaluation are not there: train.mlflow=true (local)")
    put_evaluation(toy_config(f"run.dir={tmp_path}"), 2, {"AUROC global": 0.5})  # none is asked for
    assert (
        len(wandb.starts) == 2
        and not mlflow.stores["sqlite:///" + str(tmp_path / "mlflow.db")]["runs"]
    )


def test_what_an_import_of_wandb_puts_into_the_temporary_folder_does_not_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two folders for media and artifacts, removed by an exit that a run does not take."""
    package, temporary = tmp_path / "site" / "wandb", tmp_path / "tmp"
    package.mkdir(parents=True)
    temporary.mkdir()
    made = "tempfile.kept = tempfile.TemporaryDirectory('wandb-media')"
    (package / "__init__.py").write_text(f"import tempfile\n{made}\nimport not_there_either\n")
    monkeypatch.syspath_prepend(package.parent)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.setattr(tempfile, "kept", None, raising=False)  # as a module of W&B's keeps it
    with pytest.raises(ConfigError, match=r"train\.wandb=true needs wandb"):
        _log(tmp_path / "run", "train.wandb=true")
    kept: Any = vars(tempfile)["kept"]
    assert Path(kept.name).parent.parent == temporary and not list(temporary.iterdir())
    assert tempfile.tempdir == str(temporary)


def test_a_tracker_that_is_switched_on_later_gets_all_steps_from_then_on(
    tmp_path: Path, wandb: Any, mlflow: Any
) -> None:
    log = _log(tmp_path)
    _steps(log, 1, 2, 3)
    _kill(log)
    assert not (tmp_path / "trackers.json").exists()
    log = _log(tmp_path, "train.wandb=true", "train.mlflow=true", start_step=1)
    _steps(log, 2, 3)
    log.close()
    (rows,) = wandb.rows.values()
    assert [row["step"] for row in rows] == [2, 3]
    assert [m.step for m in mlflow.run()["metrics"] if m.key == "total"] == [2, 3]


def test_nothing_is_sent_and_nothing_but_numbers_and_settings_recorded_by_default(
    tmp_path: Path, wandb: Any, mlflow: Any
) -> None:
    _log(tmp_path, "train.wandb=true", "train.mlflow=true").close()
    (start,) = wandb.starts
    assert start["dir"] == str(tmp_path) and start["settings"]["mode"] == "offline"
    off = ("x_disable_meta", "x_disable_stats", "x_disable_machine_info", "disable_git")
    off += ("disable_code", "disable_job_creation")
    assert all(start["settings"][name] is True for name in off)
    assert start["settings"]["console"] == "off" and start["settings"]["host"] == ""
    assert not start["settings"]["save_code"] and not start["settings"]["x_save_requirements"]
    assert list(mlflow.stores) == [f"sqlite:///{tmp_path}/mlflow.db"]
    # each sends counts of calls or errors to its maker otherwise, also where the runs stay here
    assert os.environ["WANDB_ERROR_REPORTING"] == "false"
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"


def test_settings_are_shown_without_the_folders_of_data(
    tmp_path: Path, wandb: Any, mlflow: Any
) -> None:
    secret = "/mnt/st-elsewhere/cardiology"
    settings = (f"data.manifest={secret}/manifest.csv", f"data.root={secret}/films/")
    settings += (f"evaluate.trained_on=[{secret}/a, b]", "train.wandb=true", "train.mlflow=true")
    settings += (f"model.vision.options={{place: {secret}/x, sizes: [1, 2]}}",)
    _log(tmp_path / "mine", *settings).close()
    shown = wandb.starts[0]["config"]
    assert shown["data"]["manifest"] == "manifest.csv" and shown["data"]["root"] == "films"
    assert shown["run"]["dir"] == "mine" and shown["evaluate"]["trained_on"] == ["a", "b"]
    assert shown["model"]["vision"]["options"] == {"place": "x", "sizes": [1, 2]}
    params = mlflow.run()["params"]
    assert params["data.manifest"] == "manifest.csv" and params["batch.global_pairs"] == "8"
    assert params["model.vision.options.sizes"] == "[1, 2]"
    for told in (json.dumps(shown), json.dumps(params)):
        assert "elsewhere" not in told and str(tmp_path) not in told
    assert settings_shown(Config())["train"]["betas"] == [0.9, 0.98]


def test_the_environment_names_project_run_and_server_as_both_tools_users_expect(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wandb: Any, mlflow: Any
) -> None:
    for name, value in {
        **{"WANDB_PROJECT": "chests", "WANDB_NAME": "third", "WANDB_RUN_ID": "given"},
        **{"WANDB_MODE": "online", "MLFLOW_EXPERIMENT_NAME": "chests"},
        "MLFLOW_TRACKING_URI": "https://ann:secret@tracking.hospital:5000",
    }.items():
        monkeypatch.setenv(name, value)
    _log(tmp_path, "train.wandb=true", "train.mlflow=true").close()
    (start,) = wandb.starts
    assert (start["project"], start["name"], start["id"]) == ("chests", "third", "given")
    assert start["settings"]["mode"] == "online"
    assert mlflow.run()["experiment"] == "e-chests"
    (store,) = mlflow.stores.values()
    assert store["place"] is None  # the server's own
    kept = (tmp_path / "trackers.json").read_text()
    assert json.loads(kept)["mlflow"] == {"https://tracking.hospital:5000": "run0"}
    # another server has no such run
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://other:5000")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", "7")
    _log(tmp_path, "train.mlflow=true").close()
    assert mlflow.stores["https://other:5000"]["runs"]["run0"]["experiment"] == "7"
    # and a run that another tool has begun
    monkeypatch.setenv("MLFLOW_RUN_ID", "run0")
    _log(tmp_path / "new", "train.mlflow=true").close()
    assert list(mlflow.stores["https://other:5000"]["runs"]) == ["run0"]


def test_wandb_that_the_environment_disables_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wandb: Any
) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    log = _log(tmp_path, "train.wandb=true")
    _steps(log, 1)
    log.close()
    assert not wandb.starts and not (tmp_path / "trackers.json").exists()


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow"])
def test_one_that_is_not_installed_is_an_error_with_what_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    for module in ("torch.utils.tensorboard", "wandb", "mlflow", "mlflow.entities"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=f"train.{name}=true needs.*pip install {name}"):
        _log(tmp_path, f"train.{name}=true")
    assert not (tmp_path / "log.jsonl").exists()


def test_one_that_cannot_be_opened_is_an_error_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wandb: Any, mlflow: Any
) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")
    wandb.has_key = False
    with pytest.raises(ConfigError, match=r"train\.wandb=true \(WANDB_MODE=online\).*no API key"):
        _log(tmp_path, "train.wandb=true")
    monkeypatch.setenv("WANDB_MODE", "of-line")
    wandb.has_key = True
    with pytest.raises(ConfigError, match=r"WANDB_MODE=of-line.*ValueError: mode: Input"):
        _log(tmp_path, "train.wandb=true")

    def refuse_key(**given: Any) -> None:
        raise PermissionError("https://ann:secret@wandb.hospital")

    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setattr(wandb, "login", refuse_key)
    with pytest.raises(ConfigError) as caught:
        _log(tmp_path, "train.wandb=true")
    assert ":secret" not in "".join(traceback.format_exception(caught.value))

    def refuse() -> None:
        raise PermissionError(
            "401 for https://ann:s@:secret@tracking.hospital/api\n" + "<page>" * 1000
        )

    mlflow.fails = refuse
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://ann:secret@tracking.hospital")
    with pytest.raises(ConfigError) as caught:
        _log(tmp_path, "train.mlflow=true")
    told = "".join(traceback.format_exception(caught.value))  # error-rank0.log
    assert "train.mlflow=true (https://tracking.hospital) cannot start: PermissionError" in told
    assert ":secret" not in told and len(str(caught.value)) < 600
    assert "remove" not in told  # there is no run that could be in the way
    assert not (tmp_path / "trackers.json").exists()


def test_a_run_that_is_gone_from_the_server_is_an_error_that_says_how_to_begin_anew(
    tmp_path: Path, mlflow: Any
) -> None:
    _log(tmp_path, "train.mlflow=true").close()
    mlflow.run()["stage"] = "deleted"
    with pytest.raises(ConfigError, match=r"run run0 was deleted there;.*remove trackers\.json"):
        _log(tmp_path, "train.mlflow=true")
    mlflow.stores.clear()
    with pytest.raises(ConfigError, match=r"Run 'run0' not found;.*remove trackers\.json"):
        _log(tmp_path, "train.mlflow=true")
    (tmp_path / "trackers.json").unlink()
    _log(tmp_path, "train.mlflow=true").close()


@pytest.mark.parametrize("content", ["{", "[]", '{"mlflow": 3}'])
def test_a_damaged_file_of_names_is_an_error_that_names_it(
    tmp_path: Path, wandb: Any, content: str
) -> None:
    (tmp_path / "trackers.json").write_text(content)
    with pytest.raises(ConfigError, match=r"trackers\.json: expected the names.*remove it"):
        _log(tmp_path, "train.wandb=true")


def test_a_folder_that_mlflows_own_store_cannot_name_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mlflow: Any
) -> None:
    with pytest.raises(ConfigError, match=r"a\?b has \? or % in its path"):
        _log(tmp_path / "a?b", "train.mlflow=true")
    working = tmp_path / os.fsdecode(b"a\xff")
    working.mkdir()
    monkeypatch.chdir(working)
    with pytest.raises(ConfigError, match=r"train\.mlflow=true: the path of run\.dir: .*UTF-8"):
        _log(Path("run"), "train.mlflow=true")


def test_another_rank_than_0_opens_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, board: Any, wandb: Any, mlflow: Any
) -> None:
    monkeypatch.setattr(distributed, "is_main", lambda: False)
    log = _log(tmp_path, "train.tensorboard=true", "train.wandb=true", "train.mlflow=true")
    _steps(log, 1)
    log.close()
    assert not board and not wandb.starts and not mlflow.stores and not list(tmp_path.iterdir())


def test_one_that_fails_is_told_of_once_and_gets_all_when_it_is_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mlflow: Any, wandb: Any, warned: Any
) -> None:
    monkeypatch.setattr(tracker_feed, "RETRY_S", 0.02)
    log = _log(tmp_path, "train.wandb=true", "train.mlflow=true")
    tries: list[int] = []

    def refuse(*row: Any) -> None:
        tries.append(1)
        raise ConnectionError("https://ann:secret@host: no route")

    mlflow.fails = wandb.fails = refuse
    _steps(log, 1, 2, 3)
    deadline = time.monotonic() + 10
    while len(tries) < 8 and time.monotonic() < deadline:
        time.sleep(0.01)
    mlflow.fails, wandb.fails = (lambda: None), (lambda row: None)
    _steps(log, 4)
    log.close()
    assert [m.step for m in mlflow.run()["metrics"] if m.key == "total"] == [1, 2, 3, 4]
    (rows,) = wandb.rows.values()
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    said = sorted(warned())
    assert [text.partition(":")[0] for text in said] == ["train.mlflow", "train.wandb"]
    assert all("ConnectionError: https://host: no route; training goes on" in t for t in said)


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow"])
def test_a_run_ends_well_where_a_tracker_fails_to_its_end(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    warned: Any,
    board: Any,
    wandb: Any,
    mlflow: Any,
    name: str,
) -> None:
    """SummaryWriter has ended a training with the error of its own thread."""

    def fail(*given: Any) -> None:
        raise OSError(28, "No space left on device")

    settings = (f"run.dir={tmp_path}", "train.max_steps=12", "train.engine=plain")
    trainer = make_trainer(toy_config(*settings, f"train.{name}=true"))
    mlflow.fails = wandb.fails = fail
    monkeypatch.setattr(_Board, "add_scalar", fail)
    trainer.fit(StopRequest())
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 13))
    first, last = warned()
    assert first.startswith(f"train.{name}: OSError: [Errno 28] No space left on device; training")
    assert last == f"train.{name}: it lacks the last 12 points"


def test_one_that_hangs_costs_points_and_no_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mlflow: Any, warned: Any
) -> None:
    monkeypatch.setattr(tracker_feed, "MOST_WAITING", 5)
    monkeypatch.setattr(trackers, "LAST_WAIT_S", 0.3)
    log = _log(tmp_path, "train.mlflow=true")
    hang = threading.Event()
    mlflow.fails = lambda: hang.wait(60) and None
    begin = time.monotonic()
    _steps(log, *range(1, 9))
    (feed,) = log._trackers._feeds
    assert len(feed._points) == 5  # a server that is gone for days fills no memory
    log.close()
    assert time.monotonic() - begin < 10
    hang.set()
    assert warned() == ["train.mlflow: it lacks the last 8 points"]


@pytest.mark.parametrize(
    ("fault", "status", "code"), [("term@0:4:load", "KILLED", 1), ("error@0:4:load", "FAILED", 1)]
)
def test_a_run_that_stops_or_fails_is_shown_as_such_until_it_goes_on(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    wandb: Any,
    mlflow: Any,
    fault: str,
    status: str,
    code: int,
) -> None:
    settings = (f"run.dir={tmp_path}", "train.max_steps=6", "train.engine=plain")
    config = toy_config(*settings, "train.wandb=true", "train.mlflow=true")
    monkeypatch.setenv("FAULT", fault)
    with pytest.raises((Preempted, RuntimeError)):
        make_trainer(config).fit(StopRequest())
    assert mlflow.run()["status"] == status and wandb.ends == [code]
    monkeypatch.delenv("FAULT")
    make_trainer(config).fit(StopRequest())
    assert mlflow.run()["status"] == "FINISHED" and wandb.ends == [code, 0]
    assert [m.step for m in mlflow.run()["metrics"] if m.key == "total"] == list(range(1, 7))
