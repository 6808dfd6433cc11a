"""The settings of the site that `make site` builds (Sphinx), and its two lists: pages and modules.

The pages are those of the checkout, read where they lie, so that a link between them is the same
here and in a code host. tests/test_site.py holds that the lists name what is there.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

# the side bar: heading -> pages, as paths below the checkout
PAGES = {
    "Train": ["docs/training.md", "docs/settings.md", "docs/reliability.md", "docs/container.md"],
    "Data": ["docs/data.md", "docs/datasets.md", "docs/dicom.md", "docs/phantoms.md"],
    "Evaluate and use": ["docs/evaluation.md", "docs/transfer.md", "docs/knowledge.md"],
    "Losses and kernels": ["docs/losses.md", "kernels/README.md", "docs/performance.md"],
    "Method and results": ["docs/method.md", "docs/results.md"],
    "Reference": ["docs/api/index.md"],
    "Project": ["CONTRIBUTING.md", "SECURITY.md", "LOG.md"],
}

# the API reference: heading -> module -> its names in the order of the page; "" = the names of its
# __all__, else every public class and function that it defines
MODULES = {
    "Losses and kernels": {
        "mlip.kernels.token_knowledge_patch": "",
        "mlip.kernels.info_nce": "",
        "mlip.kernels.keyed_uniform": "",
        "mlip.training.grad_cache": "cached_forward num_micro_batches equal_passes",
        "mlip.losses": "LOSSES GlobalContrastive LocalAlignment Category Matching Swapping",
        "mlip.losses.context": "LossContext Scales mean_over_ranks",
        "mlip.losses.local_alignment": "InPairAlignment",
        "mlip.losses.category": "sinkhorn",
        "mlip.losses.partner": "",
        "mlip.losses.held_out": "",
    },
    "Models": {
        "mlip.batch": "",
        "mlip.model": "",
        "mlip.pretrained": "",
        "mlip.transformers_auto": "MLIPForTransformers MLIPOutput MLIPConfig MLIPProcessor "
        "MLIPTokenizer",
        "mlip.transfer.films.archive": "Archive Hits ArchiveError",
    },
    "Data and reports": {
        "mlip.settings.config": "load ConfigError",
        "mlip.dataloading.manifest": "load_manifest Manifest ManifestError",
        "mlip.dataloading.loader": "build_loader Loader merge_states Pipeline",
        "mlip.dataloading.pipelines.dali_pipeline": "DaliPipeline why_not_dali",
        "mlip.dataloading.pipelines.torch_pipeline": "TorchPipeline",
        "mlip.dataloading.dicom.radiograph": "read_radiograph explain RadiographInfo read_identity "
        "Identity write_radiograph DicomError",
        "mlip.knowledge.linker": "link Mention default_linker Linker linker_of few_known_words",
    },
}

project = "MLIP"
release = re.findall(r'version="(.+?)"', (ROOT / "setup.py").read_text("utf-8"))[0]
html_title = f"MLIP {release}"
root_doc = "README"
include_patterns = [page for pages in PAGES.values() for page in pages]
include_patterns += ["README.md", "docs/api/*.md"]
# folders that need not be walked through: an environment has tens of thousands of files
exclude_patterns = [
    path.name for path in ROOT.iterdir() if path.is_dir() and path.name not in ("docs", "kernels")
]

extensions = ["myst_parser"]
myst_heading_anchors = 6  # named as code hosts name them
smartquotes = False  # what is quoted is there to be copied
html_theme = "furo"
html_static_path = ["site.css"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_copyright = False
html_show_sphinx = False
add_module_names = False
toc_object_entries_show_parents = "hide"
python_maximum_signature_line_length = 88


def _reachable(app: Any, page: str, template: str, context: dict[str, Any], doctree: Any) -> None:
    """What Sphinx and the theme leave out for a reader who has keys or ears alone.

    A line of code or a table wider than the window is read by scrolling, which keys can do where
    they reach; a heading of the side bar says its level; the corner of a table is no header.
    """
    body = context.get("body", "").replace("<pre>", '<pre tabindex="0">')
    body = body.replace('<div class="table-wrapper', '<div tabindex="0" class="table-wrapper')
    context["body"] = body.replace('<th class="head"><p></p></th>', "<td></td>")
    tree = context.get("furo_navigation_tree", "")
    context["furo_navigation_tree"] = tree.replace(
        'role="heading"', 'role="heading" aria-level="2"'
    )


def setup(app: Any) -> None:
    app.connect("html-page-context", _reachable, priority=900)  # after the theme's own
    sys.path.insert(0, str(Path(__file__).parent))
    import reference

    reference.setup(app, ROOT, PAGES, MODULES)
