"""Lines of reports: which end a statement, which were only wrapped."""

from __future__ import annotations

import pytest

from mlip.knowledge.linker import link
from mlip.knowledge.report_lines import joined_lines

WRAPPED = """There is no evidence of focal consolidation, pleural effusion, edema or
Pneumothorax. The tip of the catheter that was placed by the team of
Dr. Who lies in the right atrium, as seen on the study of March, and the
PICC has been removed
Heart size is normal"""


@pytest.mark.parametrize(
    "text, joined",
    [
        ("No pneumothorax\nCardiomegaly\n", "No pneumothorax. Cardiomegaly"),
        ("No pneumothorax\n\nCardiomegaly", "No pneumothorax\n\nCardiomegaly"),
        ("- No pneumothorax\n- cardiomegaly", "No pneumothorax. cardiomegaly"),
        ("1) No pneumothorax,\n2) Cardiomegaly", "No pneumothorax. Cardiomegaly"),
        ("Lungs: No consolidation\nHeart: enlarged", "Lungs: No consolidation. Heart: enlarged"),
        ("FINDINGS:\nNo effusion", "FINDINGS: No effusion"),
        ("No effusion.\nHeart normal", "No effusion. Heart normal"),
        ("There is no\nPneumothorax", "There is no Pneumothorax"),
        ("Pneumothorax: No\nEdema: no\nHeart", "Pneumothorax: No. Edema: no. Heart"),
        ("Edema - No\nMass - Yes", "Edema - No. Mass - Yes"),
        ("Edema\tNo\nMass\tYes", "Edema\tNo. Mass\tYes"),
        ("Edema | No\nMass | Yes", "Edema | No. Mass | Yes"),
        ("| Edema | no |\n| Mass | yes |", "Edema | no. Mass | yes"),
        ("No effusion or\npneumothorax", "No effusion or pneumothorax"),
        ("No effusion,\nEdema or nodule", "No effusion, Edema or nodule"),
        ("measuring\n2. 5 mm", "measuring 2. 5 mm"),
        ("\n \n", ""),
        ("", ""),
    ],
)  # fmt: skip
def test_a_line_that_ends_a_statement_gets_its_stop(text: str, joined: str) -> None:
    assert joined_lines(text) == joined
    assert joined_lines(joined) == joined


def test_a_wrapped_text_keeps_its_sentences() -> None:
    joined = joined_lines(WRAPPED)
    assert "edema or Pneumothorax. The tip" in joined
    assert "of Dr. Who" in joined and "and the PICC has" in joined
    assert joined.endswith("has been removed. Heart size is normal")


@pytest.mark.parametrize("between", ["\n", "\n\n", "\n- ", "\n2. "])
def test_a_denial_ends_with_its_line(between: str) -> None:
    text = joined_lines(f"No pneumothorax{between}Cardiomegaly")
    states = {mention.concept_id: mention.state for mention in link(text)}
    assert states == {"pneumothorax": "absent", "cardiomegaly": "present"}


def test_a_blank_line_still_ends_what_the_indication_says() -> None:
    text = joined_lines("INDICATION: Cough\nFever.\n\nLeft pleural effusion\nNo pneumothorax")
    states = {mention.concept_id: mention.state for mention in link(text)}
    assert states["pleural_effusion"] == "present" and states["pneumothorax"] == "absent"


@pytest.mark.parametrize("blanks", ["\t", " \t", "\t\t ", "    \t  "])
def test_an_answer_may_stand_behind_any_blanks_with_a_tab(blanks: str) -> None:
    assert joined_lines(f"Effusion{blanks}no\nHeart normal") == f"Effusion{blanks}no. Heart normal"
    assert joined_lines("Effusion   no\nHeart normal") == "Effusion   no Heart normal"
