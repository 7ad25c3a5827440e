"""The setting of an integration with a queue, and what a task says of itself."""

import pytest
from django.core import checks

from workflow_storage.contrib.options import options_of, record_task

SETTINGS = ("WORKFLOW_STORAGE_DJANGO_TASKS", "WORKFLOW_STORAGE_CELERY")


def found(setting):
    return [message for message in checks.run_checks() if setting in message.msg]


@pytest.mark.parametrize("setting", SETTINGS)
class TestCheck:
    def test_a_backend_that_is_none_is_w001(self, setting, settings):
        setattr(settings, setting, {"backend": "reporting"})

        (message,) = found(setting)

        assert message.id == "workflow_storage.W001"
        assert "'reporting'" in message.msg

    def test_an_app_that_is_made_ready_again_says_it_once(self, setting, settings):
        setattr(settings, setting, {"backend": "reporting"})
        settings.INSTALLED_APPS = [*settings.INSTALLED_APPS]  # which makes all of them ready

        assert len(found(setting)) == 1

    @pytest.mark.parametrize("value", [{}, {"backend": None}, {"backend": "memory://tasks"}])
    def test_one_that_can_be_opened_is_fine(self, value, setting, settings):
        setattr(settings, setting, value)

        assert found(setting) == []


class TestRecordTask:
    def test_a_function_says_how_it_is_recorded(self):
        @record_task(workflow_name="greeting", inputs=False)
        def greet():
            pass

        assert options_of(greet) == (True, "greeting", False)

    def test_without_parentheses_it_says_so(self):
        with pytest.raises(TypeError, match="takes parentheses"):

            @record_task
            def greet():
                pass
