import shlex

from hypothesis import given, settings
from hypothesis import strategies as st

from knowsam_monai.texts import command_line, printable, shortened


@settings(deadline=None)  # a busy machine is no fault
@given(st.text(st.characters()))
def test_printable_text_is_one_line_that_can_be_encoded(text):
    found = printable(text)
    assert len(found) == len(text) and len(found.splitlines()) <= 1 and printable(found) == found
    found.encode()


@settings(deadline=None)  # a busy machine is no fault
@given(st.text(), st.integers(3, 50))
def test_shortened_text_keeps_both_ends(text, length):
    found = shortened(text, length)
    assert len(found) == min(len(text), length)
    assert len(text) <= length or (
        printable(text).startswith(found.split("…")[0]) and printable(text).endswith(found[-1])
    )


@settings(deadline=None)  # a busy machine is no fault
@given(st.lists(st.text(min_size=1)))
def test_command_line_is_split_into_the_same_words(words):
    assert shlex.split(command_line(words)) == words
