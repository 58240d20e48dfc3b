import pytest

from oodkern.pools import clustering


@pytest.fixture(params=["together", "in turn"])
def way(request, monkeypatch):
    """Both ways to the result: distances kept, or features gone through."""
    if request.param == "in turn":
        monkeypatch.setattr(clustering, "SMALL", 0)
