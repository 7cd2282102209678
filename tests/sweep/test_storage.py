import pytest

from tracklight.errors import BadInput
from tracklight.sweep.storage import open_storage


@pytest.mark.parametrize(
    "url", ["sqlite:////nowhere/at/all.db", "oracle://x", "nonsense", "postgresql://u:pw@h:1/d"]
)
def test_a_storage_that_does_not_open_is_one_line_without_its_password(url):
    with pytest.raises(BadInput) as refused:
        open_storage(url, None)
    told = str(refused.value)
    assert told.startswith("sweep.storage=") and "\n" not in told and "pw" not in told
