"""The doctor's findings, with what is installed faked."""

from __future__ import annotations

import subprocess

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
