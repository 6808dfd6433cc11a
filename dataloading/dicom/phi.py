"""What de-identification left behind in a DICOM file: checked by name, never quoted, never mended.

Text burned into the pixels is out of reach of any header check (only its attribute is read), and
a clean result is no proof of anonymity.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from pydicom.dataset import Dataset
from pydicom.tag import Tag

from mlip.dataloading.dicom.source import (
    error_wall,
    open_regular,
    read_everything_but_pixels,
    read_file_meta,
)
from mlip.dataloading.dicom.values import value_of

# Attributes that the Basic Application Level Confidentiality Profile removes, empties or replaces
# and whose value representation alone does not give them away (PS3.15 Table E.1-1, edition 2026c).
# Names, dates and times are found by their value representation, positions by their GPS; UIDs,
# which the profile replaces by others, tell nothing here. Last, by tag, what is newer than pydicom.
_PROFILE = frozenset(
    """
    AccessionNumber AcquisitionComments AcquisitionContextDescription
    AcquisitionContextSequence AcquisitionDeviceProcessingDescription
    AcquisitionFieldOfViewLabel AcquisitionProtocolDescription ActualHumanPerformersSequence
    AdditionalPatientHistory AddressTrial AdmissionID AdmittingDiagnosesCodeSequence
    AdmittingDiagnosesDescription AffectedSOPInstanceUID Allergies AnnotationGroupDescription
    AnnotationGroupLabel Arbitrary AuthorObserverSequence BarcodeValue BeamDescription
    BolusDescription BranchOfService CameraOwnerName CassetteID CertificateOfSigner
    CertifiedTimestamp ChannelDerivationDescription ChannelLabel
    ClinicalTrialCoordinatingCenterName ClinicalTrialProtocolEthicsCommitteeApprovalNumber
    ClinicalTrialProtocolEthicsCommitteeName ClinicalTrialProtocolID ClinicalTrialProtocolName
    ClinicalTrialSeriesDescription ClinicalTrialSeriesID ClinicalTrialSiteID
    ClinicalTrialSiteName ClinicalTrialSponsorName ClinicalTrialSubjectID
    ClinicalTrialSubjectReadingID ClinicalTrialTimePointDescription ClinicalTrialTimePointID
    CommentsOnRadiationDose CommentsOnThePerformedProcedureStep CompensatorDescription
    ConceptualVolumeCombinationDescription ConceptualVolumeDescription
    ConfidentialityConstraintOnPatientDataDescription
    ConsultingPhysicianIdentificationSequence ContainerComponentID ContainerDescription
    ContainerIdentifier ContentCreatorIdentificationCodeSequence ContentSequence
    ContrastBolusAgent ContributionDescription CountryOfResidence CurrentPatientLocation
    CustodialOrganizationSequence DataSetTrailingPadding DecompositionDescription
    DerivationDescription DestinationAE DetectorID DeviceAlternateIdentifier DeviceDescription
    DeviceLabel DeviceSerialNumber DeviceSettingDescription DigitalSignaturesSequence
    DischargeDiagnosisDescription DisplacementReferenceLabel DistributionAddress
    DoseReferenceDescription EncapsulatedDocument EntityDescription EntityLabel
    EntityLongLabel EntityName EquipmentFrameOfReferenceDescription EthnicGroup
    EthnicGroupCodeSequence FillerOrderNumberImagingServiceRequest
    FilterLookupTableDescription FixationDeviceDescription FlowIdentifier
    FlowIdentifierSequence FractionGroupDescription FractionationNotes FrameComments
    FrameOriginTimestamp GantryID GeneratorID GraphicAnnotationSequence
    HardcopyCreationDeviceID HumanPerformerOrganization IconImageSequence IdentifyingComments
    ImageComments ImagePresentationComments ImagingServiceRequestComments Impressions
    InstanceOriginStatus InstitutionAddress InstitutionCodeSequence InstitutionName
    InstitutionalDepartmentName InstitutionalDepartmentTypeCodeSequence
    InsurancePlanIdentification IntendedRecipientsOfResultsIdentificationSequence
    InterlockDescription InterlockOriginDescription InterpretationApproverSequence
    InterpretationDiagnosisDescription InterpretationID InterpretationIDIssuer
    InterpretationText IssuerOfAdmissionID IssuerOfAdmissionIDSequence
    IssuerOfClinicalTrialProtocolID IssuerOfClinicalTrialSeriesID IssuerOfClinicalTrialSiteID
    IssuerOfClinicalTrialSubjectID IssuerOfClinicalTrialSubjectReadingID
    IssuerOfClinicalTrialTimePointID IssuerOfPatientID IssuerOfServiceEpisodeID
    IssuerOfServiceEpisodeIDSequence IssuerOfTheContainerIdentifierSequence
    IssuerOfTheSpecimenIdentifierSequence LabelText LensMake LensModel LensSerialNumber
    LensSpecification LongDeviceDescription MAC MakerNote ManufacturerDeviceIdentifier
    MedicalAlerts MedicalRecordLocator MilitaryRank ModifiedAttributesSequence
    ModifiedImageDescription ModifyingDeviceID ModifyingSystem
    MultienergyAcquisitionDescription MultiplexGroupLabel NamesOfIntendedRecipientsOfResults
    NetworkID NonconformingDataElementValue NonconformingModifiedAttributesSequence Occupation
    OperatorIdentificationSequence OrderCallbackPhoneNumber OrderCallbackTelecomInformation
    OrderEntererLocation OriginalAttributesSequence Originator
    OtherClinicalTrialProtocolIDsSequence OtherPatientIDs OtherPatientIDsSequence
    ParticipantSequence PatientAddress PatientAge PatientComments PatientID
    PatientInstitutionResidence PatientInsurancePlanCodeSequence PatientMotherBirthName
    PatientPrimaryLanguageCodeSequence PatientPrimaryLanguageModifierCodeSequence
    PatientReligiousPreference PatientSetupPhotoDescription PatientSex PatientSexNeutered
    PatientSize PatientState PatientTelecomInformation PatientTelephoneNumbers
    PatientTransportArrangements PatientTreatmentPreparationMethodDescription
    PatientTreatmentPreparationProcedureParameterDescription PatientWeight PerformedLocation
    PerformedProcedureStepDescription PerformedProcedureStepID PerformedStationAETitle
    PerformedStationGeographicLocationCodeSequence PerformedStationName
    PerformedStationNameCodeSequence PerformingPhysicianIdentificationSequence PersonAddress
    PersonIdentificationCodeSequence PersonTelecomInformation PersonTelephoneNumbers
    PhysicianApprovingInterpretation PhysiciansOfRecordIdentificationSequence
    PhysiciansReadingStudyIdentificationSequence PlacerOrderNumberImagingServiceRequest
    PlateID PositionAcquisitionTemplateDescription PositionAcquisitionTemplateName
    PreMedication PregnancyStatus PrescriptionDescription PrescriptionNotes
    PrescriptionNotesSequence PriorTreatmentDoseDescription ProtocolName PyramidDescription
    PyramidLabel ROICreatorSequence ROIDescription ROIGenerationDescription
    ROIInterpreterSequence ROIName ROIObservationDescription ROIObservationLabel
    RTAccessoryDeviceSlotID RTAccessoryHolderSlotID RTPhysicianIntentNarrative
    RTPlanDescription RTPlanLabel RTPlanName RTPrescriptionLabel RTToleranceSetLabel
    RTTreatmentApproachLabel RadiationDoseIdentificationLabel
    RadiationDoseInVivoMeasurementLabel RadiationGenerationModeDescription
    RadiationGenerationModeLabel ReasonForOmissionDescription
    ReasonForRequestedProcedureCodeSequence ReasonForStudy ReasonForSuperseding
    ReasonForTheAttributeModification ReasonForTheImagingServiceRequest
    ReasonForTheRequestedProcedure ReasonForVisit ReasonForVisitCodeSequence ReceivingAE
    ReferencedDigitalSignatureSequence ReferencedPatientAliasSequence
    ReferencedPatientPhotoSequence ReferencedPatientSequence
    ReferencedPerformedProcedureStepSequence ReferencedSOPInstanceMACSequence
    ReferencedStudySequence ReferringPhysicianAddress ReferringPhysicianIdentificationSequence
    ReferringPhysicianTelephoneNumbers RegionOfResidence RequestAttributesSequence
    RequestedContrastAgent RequestedProcedureComments RequestedProcedureDescription
    RequestedProcedureID RequestedProcedureLocation RequestedSeriesDescription RequestingAE
    RequestingService RespiratoryMotionCompensationTechniqueDescription
    ResponsibleOrganization ResultsComments ResultsDistributionListSequence ResultsID
    ResultsIDIssuer RetrieveAETitle ScheduledHumanPerformersSequence
    ScheduledPatientInstitutionResidence ScheduledPerformingPhysicianIdentificationSequence
    ScheduledProcedureStepDescription ScheduledProcedureStepID ScheduledProcedureStepLocation
    ScheduledStationAETitle ScheduledStationGeographicLocationCodeSequence
    ScheduledStationName ScheduledStationNameCodeSequence ScheduledStudyLocation
    ScheduledStudyLocationAETitle SecondaryCaptureDeviceID SelectorAEValue SelectorASValue
    SelectorLOValue SelectorLTValue SelectorOBValue SelectorSHValue SelectorSTValue
    SelectorUNValue SelectorURValue SelectorUTValue SeriesDescription
    ServiceEpisodeDescription ServiceEpisodeID SetupTechniqueDescription
    ShieldingDeviceDescription SlideIdentifier SmokingStatus SourceIdentifier
    SourceManufacturer SourceOfPreviousValues SourceSerialNumber SpecialNeeds
    SpecimenAccessionNumber SpecimenDetailedDescription SpecimenIdentifier
    SpecimenPreparationSequence SpecimenShortDescription StationAETitle StationName
    StructureSetDescription StructureSetLabel StructureSetName StudyComments StudyDescription
    StudyID StudyIDIssuer TelephoneNumberTrial TextComments TextString TimezoneOffsetFromUTC
    TopicAuthor TopicKeywords TopicSubject TopicTitle TransducerIdentificationSequence
    TreatmentMachineName TreatmentPositionGroupLabel TreatmentSite TreatmentSites
    TreatmentTechniqueNotes TreatmentToleranceViolationDescription UDISequence
    UnformattedTextValue UniqueDeviceIdentifier UserContentLabel UserContentLongLabel
    VerbalSourceIdentifierCodeSequenceTrial VerifyingObserverIdentificationCodeSequence
    VerifyingObserverSequence VerifyingOrganization VisitComments WaveformAnnotationSequence
    WaveformFilterDescription XRayDetectorID XRayDetectorLabel XRaySourceID
    0008,1301 0008,1302 0008,1303 0008,1304 0010,0011 0010,0012 0010,0013 0010,0014 0010,0015
    0010,0016 0010,0041 0010,0042 0010,0043 0010,0044 0010,0045 0010,0046 0010,0047 0010,2162
    0040,A034 0040,A035 0040,B034 0040,B036 0040,B03B 0040,B03F 0040,E012
    """.split()
)
# of the application that wrote the file last: E.1.1 has a de-identifier replace this group
_FILE_META = {
    0x0016: ("SourceApplicationEntityTitle", "profile"),
    0x0017: ("SendingApplicationEntityTitle", "profile"),
    0x0018: ("ReceivingApplicationEntityTitle", "profile"),
    0x0026: ("SourcePresentationAddress", "profile"),
    0x0027: ("SendingPresentationAddress", "profile"),
    0x0028: ("ReceivingPresentationAddress", "profile"),
    0x0102: ("PrivateInformation", "private"),
}
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
    """Every attribute, in sequences too, that the Basic Profile removes, empties or replaces.

    UIDs, which it replaces by others, are not looked at.

    Returns: sorted by attribute; empty = nothing found in the header, which is no proof
    Raises:  DicomError where the file cannot be parsed.
    Source:  DICOM PS3.15 E.1 and E.1.1, PS3.3 C.7.1.1 and C.7.6.1; preamble as PS3.10 7.5.
    """
    with error_wall("malformed"), open_regular(source) as (file, _):
        preamble = file.read(128)
        dataset = read_everything_but_pixels(file)
        found = set(_walk(dataset))
        for element, value in read_file_meta(file)[0].items():
            if element in _FILE_META and value.strip(b" \0"):
                found.add(Leftover(*_FILE_META[element]))
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
    value = value_of(dataset, name)
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
        elif element.tag.group & 0xFF01 == 0x5000:  # curves
            found.append(Leftover(_name(tag), "profile"))
        elif element.VR == "PN":
            found.append(Leftover(name, "name"))
        elif element.VR in _TEMPORAL:
            found.append(Leftover(name, "date"))
        elif name in _PROFILE or _name(tag) in _PROFILE or name.startswith("GPS"):
            found.append(Leftover(name, "profile"))
        if element.VR == "SQ" and depth < 32:
            for item in element.value:
                found += _walk(item, depth + 1)
    return found


def _name(tag: int) -> str:
    tag = Tag(tag)
    return f"{tag.group:04X},{tag.element:04X}"
