"""The doctor's findings, with what is installed faked."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from mlip import doctor


def test_this_machine_is_healthy_and_no_torchvision_is_here(
    capsys: pytest.CaptureFixture[str],
) -> None:
    from mlip.cli import main

    assert doctor.check_torchvision() is None  # it would break transformers on this torch
    assert main(["doctor"]) == 0
    assert "Ready" in capsys.readouterr().out


def test_a_missing_package_comes_with_the_line_that_installs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(doctor, "version_of", lambda name: None)
    monkeypatch.setattr(doctor, "_is_importable", lambda module: module != "deepspeed")
    by_name = {check.name: check for check in doctor.check_packages()}
    assert by_name["deepspeed"].state == doctor.MISSING
    assert by_name["deepspeed"].remedy == "pip install 'mlip-medical[deepspeed]'"
    assert doctor.is_healthy(list(by_name.values()))  # optional
    monkeypatch.setattr(doctor, "_is_importable", lambda module: module != "pydicom")
    checks = doctor.check_packages()
    assert not doctor.is_healthy(checks)
    text = doctor.report(checks)
    assert "To mend:\n  pip install pydicom" in text and "Ready" not in text


def test_every_package_that_an_installation_asks_for_is_looked_at() -> None:
    """Oracle: setup.py. With one of them absent training ended in a traceback after "Ready"."""
    setup = (Path(__file__).resolve().parent.parent / "setup.py").read_text()
    asked = re.findall(r'"([\w-]+)[<>=]', setup.split("install_requires=[")[1].split("]")[0])
    assert len(asked) > 15
    assert set(asked) <= {name for name, _, _, is_needed in doctor.PACKAGES if is_needed}


def test_a_version_outside_the_range_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["transformers<6,>=5.17", 'deepspeed<0.20,>=0.19.8; extra == "gpu"', "torch>=2.11"]
    monkeypatch.setattr(doctor.importlib.metadata, "requires", lambda name: lines)
    found = {"transformers": "4.57.1", "deepspeed": "0.20.0", "torch": "2.13.0+cpu"}
    monkeypatch.setattr(doctor, "version_of", lambda name: found.get(name, "1"))
    by_name = {check.name: check for check in doctor.check_packages()}
    assert by_name["torch"].state == by_name["numpy"].state == doctor.OK
    assert by_name["transformers"].state == by_name["deepspeed"].state == doctor.BROKEN
    assert by_name["transformers"].remedy == "pip install 'transformers<6,>=5.17'"
    assert not doctor.is_healthy(list(by_name.values()))
    text = doctor.report(list(by_name.values()))
    assert "4.57.1: image and text towers; <6,>=5.17 is needed" in text and "Ready" not in text


def test_a_checkout_that_is_not_installed_asks_for_no_versions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def absent(name: str) -> None:
        raise doctor.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(doctor.importlib.metadata, "requires", absent)
    assert doctor.ranges() == {}


def test_a_torchvision_of_another_torch_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "version_of", lambda name: "0.28.0")
    broken = subprocess.CompletedProcess(
        [], 1, "", "Traceback\nRuntimeError: operator torchvision::nms does not exist\n"
    )
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: broken)
    check = doctor.check_torchvision()
    assert check is not None and check.state == doctor.BROKEN
    assert "nms does not exist" in check.detail
    assert check.remedy == "pip uninstall -y torchvision"
    monkeypatch.setattr(
        subprocess, "run", lambda *a, **k: subprocess.CompletedProcess([], 0, "", "")
    )
    check = doctor.check_torchvision()
    assert check is not None and check.state == doctor.OK


def test_the_other_project_of_our_name_and_the_old_dali_are_warned_of(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(doctor, "version_of", lambda name: "0.2.5")
    clash, dali = doctor.check_name_clash(), doctor.check_dali()
    assert clash is not None and "interatomic" in clash.detail
    assert dali is not None and "zeros" in dali.detail
    assert not doctor.is_healthy([clash])
