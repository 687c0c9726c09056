"""Every interpreter that finds this first imports the copy in KTCORE_MUTANT_COPY instead of the editable installs.

Editable installs come as finders with absolute paths, which go before PYTHONPATH: their paths are rewritten.
"""

import os
import sys

COPY = os.environ["KTCORE_MUTANT_COPY"]
ROOT = os.environ["KTCORE_MUTANT_ROOT"]


def moved(path):
    inside = path == ROOT or path.startswith(ROOT + os.sep)
    hidden = os.sep + "." in path[len(ROOT) :]  # the environment itself, as .venv
    return COPY + path[len(ROOT) :] if inside and not hidden else path


sys.path[:] = [moved(p) for p in sys.path]
for finder in sys.meta_path:
    if hasattr(finder, "known_source_files"):  # scikit-build-core
        finder.known_source_files = {k: moved(v) for k, v in finder.known_source_files.items()}
        finder.submodule_search_locations = {
            k: type(v)(moved(p) for p in v) for k, v in getattr(finder, "submodule_search_locations", {}).items()
        }
for name, module in list(sys.modules.items()):
    if name.startswith("__editable___") and hasattr(module, "MAPPING"):  # setuptools
        module.MAPPING.update({k: moved(v) for k, v in module.MAPPING.items()})
