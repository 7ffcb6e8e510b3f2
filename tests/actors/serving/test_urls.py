"""A pool's URL is one that clients take, whatever address it listens on."""

from urllib.parse import urlsplit

import pytest

from actors.serving.control import url_of
from rlhf_critic.scoring.http_client import connect_http


@pytest.mark.parametrize(
    ("host", "app", "url"),
    [
        ("127.0.0.1", "scorers", "http://127.0.0.1:8000"),
        ("::1", "scorers", "http://[::1]:8000"),
        ("::", "other", "http://[::]:8000/other"),
    ],
)
def test_the_url_names_host_and_port(host, app, url):
    assert url_of(host, 8000, app) == url
    assert (urlsplit(url).hostname, urlsplit(url).port) == (host, 8000)
    connect_http(url).close()
