"""Which errors count as this program's: those of a kind no content raises, in a line of its own."""

from __future__ import annotations

import json
import struct

import pytest

from mlip.system.own_mistake import own_mistake


def raised(source: str, module: str) -> BaseException:
    """What the source raises as a line of the module."""
    try:
        exec(source, {"__name__": module, "json": json, "struct": struct})
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


@pytest.mark.parametrize(
    "source", ["None.value", "{}['a']", "[][0]", "1 + ''", "nowhere", "assert 0"]
)
def test_a_line_of_this_package_that_breaks_is_its_mistake(source):
    place = own_mistake(raised(source, "mlip.dataloading.dicom.header"))
    assert place is not None and place.endswith(" in mlip.dataloading.dicom.header, line 1")
    assert own_mistake(raised(source, "pydicom.dataset")) is None


@pytest.mark.parametrize(
    "source", ["int('inf')", "struct.unpack('<H', b'')", "b'\\xff'.decode()", "raise OSError"]
)
def test_what_content_raises_there_is_not(source):
    assert own_mistake(raised(source, "mlip.dataloading.dicom.header")) is None


def test_an_error_in_a_library_that_a_line_of_ours_calls_is_not():
    assert isinstance(error := raised("json.loads(1)", "mlip.saved"), TypeError)
    assert own_mistake(error) is None
