"""What de-identification left behind in a DICOM file: checked by name, never quoted, never mended.

Text burned into the pixels is out of reach of any header check (only its attribute is read), and
a clean result is no proof of anonymity.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from pydicom.dataset import Dataset
from pydicom.tag import Tag

from mlip.dataloading.dicom_source import error_wall, open_regular, read_everything_but_pixels

# Attributes that the Basic Application Level Confidentiality Profile removes, empties or replaces
# and whose value representation alone does not give them away (PS3.15 Table E.1-1). Names, dates
# and times are found by their value representation.
_PROFILE = frozenset(
    """
    AccessionNumber AcquisitionComments AcquisitionContextSequence
    AcquisitionProtocolDescription ActualHumanPerformersSequence AdditionalPatientHistory
    AddressTrial AdmissionID AdmittingDiagnosesDescription AffectedSOPInstanceUID Allergies
    Arbitrary AuthorObserverSequence BranchOfService CassetteID ClinicalTrialProtocolID
    ClinicalTrialSiteID ClinicalTrialSiteName ClinicalTrialSubjectID
    ClinicalTrialSubjectReadingID CommentsOnThePerformedProcedureStep
    ConfidentialityConstraintOnPatientDataDescription ContributionDescription
    CountryOfResidence CurrentPatientLocation CustodialOrganizationSequence
    DataSetTrailingPadding DerivationDescription DetectorID DeviceSerialNumber
    DischargeDiagnosisDescription DistributionAddress EthnicGroup
    FillerOrderNumberImagingServiceRequest FrameComments GantryID GeneratorID ImageComments
    ImagePresentationComments ImagingServiceRequestComments Impressions InstitutionAddress
    InstitutionCodeSequence InstitutionName InstitutionalDepartmentName
    InsurancePlanIdentification IntendedRecipientsOfResultsIdentificationSequence
    InterpretationText IssuerOfAdmissionID IssuerOfPatientID IssuerOfServiceEpisodeID
    MedicalAlerts MedicalRecordLocator MilitaryRank ModifiedAttributesSequence
    NamesOfIntendedRecipientsOfResults Occupation OperatorIdentificationSequence
    OrderCallbackPhoneNumber OrderEntererLocation OriginalAttributesSequence OtherPatientIDs
    OtherPatientIDsSequence PatientAddress PatientAge PatientComments PatientID
    PatientInstitutionResidence PatientMotherBirthName PatientReligiousPreference PatientSex
    PatientSize PatientState PatientTelecomInformation PatientTelephoneNumbers
    PatientTransportArrangements PatientWeight PerformedLocation
    PerformedProcedureStepDescription PerformedProcedureStepID PerformedStationAETitle
    PerformedStationName PersonAddress PersonIdentificationCodeSequence PersonTelephoneNumbers
    PhysicianApprovingInterpretation PhysiciansOfRecordIdentificationSequence
    PhysiciansReadingStudyIdentificationSequence PlacerOrderNumberImagingServiceRequest PlateID
    PreMedication PregnancyStatus ProtocolName ReasonForStudy ReasonForTheImagingServiceRequest
    ReferringPhysicianAddress ReferringPhysicianIdentificationSequence
    ReferringPhysicianTelephoneNumbers RegionOfResidence RequestAttributesSequence
    RequestedContrastAgent RequestedProcedureComments RequestedProcedureDescription
    RequestedProcedureID RequestedProcedureLocation RequestingService ResponsibleOrganization
    ResultsComments ResultsDistributionListSequence ResultsIDIssuer
    ScheduledPatientInstitutionResidence ScheduledProcedureStepDescription
    ScheduledProcedureStepLocation ScheduledStationAETitle ScheduledStationName
    ScheduledStudyLocation ScheduledStudyLocationAETitle SeriesDescription
    ServiceEpisodeDescription ServiceEpisodeID SmokingStatus SourceIdentifier SpecialNeeds
    StationName StudyComments StudyDescription StudyID StudyIDIssuer TextComments TextString
    TopicAuthor TopicKeywords TopicSubject TopicTitle VerifyingOrganization VisitComments
    """.split()
)
_TEMPORAL = frozenset({"DA", "DT", "TM"})
_EXECUTABLES = (b"MZ", b"\x7fELF", b"\xfe\xed\xfa", b"\xcf\xfa\xed\xfe", b"\xce\xfa\xed\xfe", b"#!")


# what makes a strict run refuse a file; the rest is often kept under a documented option
SEVERE = frozenset({"name", "not_yes", "burned_in", "executable", "overlay"})


@dataclass(frozen=True)
class Leftover:
    """One attribute that may identify a patient: where it stands and why, without its value."""

    attribute: str  # keyword, or group and element of a private or unknown tag
    reason: str  # "profile" | "name" | "date" | "private" | "overlay" | "burned_in" | ...


def check_phi(source: str | os.PathLike[str] | bytes) -> list[Leftover]:
    """Every attribute, in sequences too, that the Basic Profile would have removed or emptied.

    Returns: sorted by attribute; empty = nothing found in the header, which is no proof
    Raises:  DicomError where the file cannot be parsed.
    Source:  DICOM PS3.15 E.1, PS3.3 C.7.1.1 and C.7.6.1; preamble as PS3.10 7.5.
    """
    with error_wall("malformed"), open_regular(source) as (file, _):
        preamble = file.read(128)
        dataset = read_everything_but_pixels(file)
        found = set(_walk(dataset))
        if preamble.startswith(_EXECUTABLES):
            found.add(Leftover("preamble", "executable"))
        elif preamble.strip(b"\0") and preamble[:4] not in (b"II*\0", b"MM\0*"):
            found.add(Leftover("preamble", "not_empty"))
        if _plain(dataset, "PatientIdentityRemoved") != "YES":
            found.add(Leftover("PatientIdentityRemoved", "not_yes"))
        burned = _plain(dataset, "BurnedInAnnotation")
        if burned != "NO":
            reason = "burned_in" if burned == "YES" else "burned_in_unknown"
            found.add(Leftover("BurnedInAnnotation", reason))
    return sorted(found, key=lambda leftover: (leftover.attribute, leftover.reason))


def _plain(dataset: Dataset, name: str) -> str:
    value = dataset.get(name)
    return value.strip().upper() if isinstance(value, str) else ""


def _walk(dataset: Dataset, depth: int = 0) -> list[Leftover]:
    found: list[Leftover] = []
    for tag in dataset.keys():
        try:
            element = dataset[tag]
        except Exception:
            # a value that cannot be converted is still a value somebody may read
            found.append(Leftover(_name(tag), "unreadable"))
            continue
        if element.is_empty:
            continue
        name = element.keyword or _name(tag)
        if element.tag.is_private:
            found.append(Leftover(name, "private"))
        elif element.tag.group & 0xFF01 == 0x6000:
            found.append(Leftover(_name(tag), "overlay"))
        elif element.tag.group == 0x0002:
            continue
        elif element.VR == "PN":
            found.append(Leftover(name, "name"))
        elif element.VR in _TEMPORAL:
            found.append(Leftover(name, "date"))
        elif name in _PROFILE:
            found.append(Leftover(name, "profile"))
        if element.VR == "SQ" and depth < 32:
            for item in element.value:
                found += _walk(item, depth + 1)
    return found


def _name(tag: int) -> str:
    tag = Tag(tag)
    return f"{tag.group:04X},{tag.element:04X}"
