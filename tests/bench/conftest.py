import pytest

from rba_core.bench.synthetic import make_set


@pytest.fixture(scope="session")
def small_set(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets") / "small"
    make_set(folder, 2, seed=0, size=192)
    return folder
