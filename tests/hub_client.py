"""The real `huggingface_hub` client against the Hub on loopback, as fixtures of the session. Test files ask for them by
`pytest_plugins = ["hub_client"]`.

The client takes its endpoint from the environment when it is imported, so one process with that environment runs the
functions that tests hand to it. Their modules must not import conftest, which puts the client offline.
"""

import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from unittest import mock

import pytest
from local_hub import LocalHub


@pytest.fixture(scope="session")
def hub(tmp_path_factory) -> Iterator[LocalHub]:
    """At the session's end nothing that any test pushed may hold a secret, or a path of this machine."""
    with LocalHub() as hub:
        yield hub
        assert not hub.leaks(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="session")
def home(tmp_path_factory) -> Path:
    """The client's cache."""
    return tmp_path_factory.mktemp("hub-client")


@pytest.fixture(scope="session")
def client(hub, home) -> Iterator[Callable]:
    """Calls a function in the process of the client; an exception there is raised here."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        with mock.patch.dict(os.environ, hub.environment(str(home))):
            assert pool.submit(endpoint).result() == hub.url
        yield lambda function, *args, **options: pool.submit(function, *args, **options).result()


def endpoint() -> str:
    import torch
    from huggingface_hub import HfApi
    from huggingface_hub.utils import disable_progress_bars
    from transformers.utils import logging

    torch.set_num_threads(1)
    disable_progress_bars()
    logging.disable_progress_bar()
    return HfApi().endpoint
