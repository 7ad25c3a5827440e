"""``manage.py screenshots``, as a user runs it: in a process of its own, on an empty database."""

import pytest

from testproject.management.commands.screenshots import MAX_BYTES, PAGES
from tests.testproject.test_demo import manage

pytestmark = pytest.mark.slow


@pytest.fixture
def url(tmp_path):
    return f"sqlite:///{tmp_path}/workflows.db"


def test_it_takes_a_small_picture_of_each_page_in_light_and_in_dark(browser, url, tmp_path):
    result = manage("screenshots", tmp_path / "pictures", url=url)

    assert result.returncode == 0, result.stderr
    files = {file.name: file.stat().st_size for file in (tmp_path / "pictures").iterdir()}
    assert set(files) == {f"{page}-{scheme}.png" for page in PAGES for scheme in ("light", "dark")}
    assert max(files.values()) < MAX_BYTES
    assert all(name in result.stdout for name in files)


def test_it_says_that_there_is_no_chromium(browser, url, tmp_path):
    result = manage("screenshots", tmp_path, "--chromium", "/nowhere/chromium", url=url)

    assert result.returncode == 1
    assert "CommandError: There is no Chromium at /nowhere/chromium." in result.stderr
