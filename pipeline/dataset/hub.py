"""Says why a dataset of the Hugging Face Hub cannot be found."""

from __future__ import annotations

import re

_DATASET = re.compile(r"hf://datasets/(?P<name>[^/@]+/[^/@]+)(@(?P<revision>refs/(pr|convert)/[^/]+|[^/]+))?")


def missing_dataset(path: str) -> str:
    """The reason why the hub does not show the dataset of this path. Empty if it does, or if the path has another form."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
    from huggingface_hub.utils import get_token

    match = _DATASET.match(path)
    if match is None:
        return "" if path.startswith("hf://datasets/") and path.count("/") > 3 else "a dataset is hf://datasets/OWNER/NAME"
    name, revision = match["name"], match["revision"]
    token = "the token in HF_TOKEN may not read it" if get_token() else "it is private and HF_TOKEN is not set"
    try:
        HfApi().dataset_info(name, revision=revision.replace("%2F", "/") if revision else None)
    except GatedRepoError:
        return f"the dataset {name} is gated: accept its terms on the hub, and set HF_TOKEN"
    except RevisionNotFoundError:
        return f"the dataset {name} has no revision {revision}"
    except RepositoryNotFoundError:
        return f"there is no dataset {name} on the hub, or {token}"
    except Exception:  # a network error: the caller has one with its reason
        pass
    return ""
