"""Names of views and the projections they mean.

Oracles: the terms of the DICOM standard; the values that data sets publish, and for the frontal
films of each the lists by which they were told before there was one place for it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pydicom
import pytest

from mlip.dataloading.dicom.radiograph import read_identity, read_radiograph, write_radiograph
from mlip.dataloading.view_position import PROJECTIONS, is_frontal, is_view_name, projection

MIMIC = (
    "AP,PA,LATERAL,LL,AP AXIAL,AP LLD,AP RLD,PA LLD,PA RLD,LAO,RAO,LPO,SWIMMERS,XTABLE LATERAL,"
).split(",")
PADCHEST = "PA,L,AP_horizontal,AP,COSTAL,EXCLUDE,UNK".split(",")


@pytest.mark.parametrize(
    ("views", "expected"),
    [
        ("PA|pa| PA |PA ERECT|P.A.|p.a.|P/A|Thorax p. a. stehend|CHEST PA", "PA"),
        ("posteroanterior|postero-anterior|POSTERIOR ANTERIOR|p\u00f3stero-anterior", "PA"),
        ("dorsoventral|post\u00e9ro-ant\u00e9rieure|poste\u0301ro-ante\u0301rieur", "PA"),
        ("AP|AP_horizontal|AP SUPINE|AP Portable|A.P.|a.p. liegend|AP dec\u00fabito supino", "AP"),
        ("antero-posterior|Anteroposterior|ant\u00e9ro-post\u00e9rieur|ventro-dorsal", "AP"),
        ("FRONTAL|Frontal|PA\\AP|AP/PA|de face|frente|PA/frontal/AP", "FRONTAL"),
        ("LL|RL|LATERAL|Lateral|LAT|L|XTABLE LATERAL|LL\\LATERAL", "LATERAL"),
        ("left lateral|seitlich|lateral izq.|perfil|profil gauche|latero-laterale", "LATERAL"),
        ("dorsal decubitus lateral", "LATERAL"),
        ("LLD|RLD|AP LLD|PA RLD|AP\\LLD|LATERAL DECUBITUS|Linksseitenlage", "DECUBITUS"),
        ("dec\u00fabito lateral|d\u00e9cubitus lat\u00e9ral droit", "DECUBITUS"),
        ("RLO|LLO|RAO|LAO|LPO|RPO|OBLIQUE|oblicua|schr\u00e4g|postero-anterior oblique", "OBLIQUE"),
        ("AP AXIAL|LORDOTIC|PA APICAL|SWIMMERS|COSTAL|EXCLUDE|MLO|OBLONG", "OTHER"),
        ("| |UNK|unknown|NA|N/A|n/a|Not stated|U|UNSPECIFIED|PA\\LL|AP LATERAL", ""),
        ("SUPINE|erect|CHEST|Thorax|PORTABLE|dorsal decubitus|p.a./seitlich", ""),
    ],
)
def test_each_name_means_one_projection(views: str, expected: str) -> None:
    assert {projection(view) for view in views.split("|")} == {expected}
    assert expected in (*PROJECTIONS, "")


def test_what_else_than_the_words_of_a_view_stands_in_a_cell_is_no_name_of_one() -> None:
    """Counts print names: of published sets and departments, never a patient's."""
    own = "Thorax seitl.|Schr\u00e4gaufnahme|Postero-anterior|portable|N/A|PA\\LL|"
    for name in (*MIMIC, *PADCHEST, *own.split("|")):
        assert is_view_name(name), name
    for cell in ("PA Doe", "AP 4711", "LATERAL1947", "http://pacs/PA", "Schrader", "ROUTINE"):
        assert not is_view_name(cell)


@pytest.mark.parametrize(
    ("views", "before"),
    [(MIMIC, {"PA", "AP", "FRONTAL"}), (PADCHEST, {"PA", "AP", "AP_horizontal"})],
)
def test_the_frontal_films_of_published_sets_are_those_of_before(
    views: list[str], before: set[str]
) -> None:
    assert {view for view in views if is_frontal(view)} == before & set(views)


@pytest.mark.filterwarnings("ignore:Invalid value for VR CS")
def test_a_header_of_several_views_keeps_them_and_free_text_stays_out(tmp_path: Path) -> None:
    path = tmp_path / "film.dcm"
    write_radiograph(
        path,
        np.arange(1600, dtype=np.uint16).reshape(40, 40),
        view="AP",
        patient_id="P",
        study_id="S",
    )
    for view, expected in (
        (["AP", "LLD"], "AP\\LLD"),
        (["PA", "PA"], "PA"),
        (["PA", ""], "PA"),
        (["PA", "of Mrs. Doe"], ""),
        ("Mrs. Doe", ""),
        ("p.a.", "PA"),
        ("antero-posterior", "AP"),
        (["P.A.", "A.P."], "PA\\AP"),
    ):
        dataset = pydicom.dcmread(path)
        dataset.add_new(0x00185101, "CS", view)
        pydicom.dcmwrite(tmp_path / "new.dcm", dataset)
        info = read_radiograph(tmp_path / "new.dcm")[1]
        assert info.view == expected
        assert ("several_views" in info.notes) == (len(expected.split("\\")) > 1)


def test_the_view_code_stands_where_the_view_position_tells_no_projection(tmp_path: Path) -> None:
    """A DX image must have ViewCodeSequence and may lack ViewPosition; oracle: CID 4010."""
    path = tmp_path / "film.dcm"
    write_radiograph(
        path,
        np.arange(1600, dtype=np.uint16).reshape(40, 40),
        patient_id="P",
        study_id="S",
    )
    for position, meaning, expected in (
        (None, "postero-anterior", "PA"),
        ("", "antero-posterior", "AP"),
        ("CHEST", "left lateral", "LATERAL"),
        ("AP", "postero-anterior", "AP"),
        ("ROUTINE", "postero-anterior", "PA"),  # a word of no view states none
        ("AP AXIAL", "antero-posterior", "AP AXIAL"),
        ("CHEST", "of Mrs. Doe", "CHEST"),
        ("ROUTINE", "of Mrs. Doe", "ROUTINE"),
        (None, "axial", "OTHER"),
        (None, "", ""),
    ):
        dataset = pydicom.dcmread(path)
        if position is None:
            del dataset.ViewPosition
        else:
            dataset.ViewPosition = position
        code = pydicom.Dataset()
        code.CodeMeaning = meaning
        dataset.ViewCodeSequence = [code]
        pydicom.dcmwrite(tmp_path / "new.dcm", dataset)
        assert read_radiograph(tmp_path / "new.dcm")[1].view == expected
        assert read_identity(tmp_path / "new.dcm").view == expected


def test_what_a_filter_reads_is_what_the_manifest_says_also_of_free_text(tmp_path: Path) -> None:
    """views=frontal goes by the one, evaluate.subgroups by the other."""
    path = tmp_path / "film.dcm"
    picture = np.arange(1600, dtype=np.uint16).reshape(40, 40)
    write_radiograph(path, picture, patient_id="P", study_id="S")
    for position, expected in (
        ("Chest of Mrs. Doe, standing", "PA"),
        ("Lordotic, of Mrs. Doe's apices", "OTHER"),
        ("seitlich (Frau Doe)", "LATERAL"),
    ):
        dataset = pydicom.dcmread(path)
        dataset.add_new(0x00185101, "LO", position)
        code = pydicom.Dataset()
        code.CodeMeaning = "postero-anterior"
        dataset.ViewCodeSequence = [code]
        pydicom.dcmwrite(tmp_path / "new.dcm", dataset)
        assert read_radiograph(tmp_path / "new.dcm")[1].view == expected
        assert projection(read_identity(tmp_path / "new.dcm").view) == expected


def test_what_stands_in_place_of_a_view_refuses_no_film(tmp_path: Path) -> None:
    path = tmp_path / "film.dcm"
    write_radiograph(
        path,
        np.arange(1600, dtype=np.uint16).reshape(40, 40),
        patient_id="P",
        study_id="S",
    )
    item = pydicom.Dataset()
    item.add_new(0x00080104, "SQ", [pydicom.Dataset()])  # CodeMeaning of another kind
    for kind, value in (("LO", "PA"), ("US", 7), ("SQ", []), ("SQ", [item])):
        dataset = pydicom.dcmread(path)
        del dataset.ViewPosition
        dataset.add_new(0x00540220, kind, value)
        pydicom.dcmwrite(tmp_path / "new.dcm", dataset)
        assert read_radiograph(tmp_path / "new.dcm")[1].view == ""
        assert read_identity(tmp_path / "new.dcm").view == ""
        dataset = pydicom.dcmread(path)
        dataset.add_new(0x00185101, kind, value)
        pydicom.dcmwrite(tmp_path / "new.dcm", dataset)
        assert read_radiograph(tmp_path / "new.dcm")[1].view in ("", "PA", "7")
        assert read_identity(tmp_path / "new.dcm").modality == "DX"
