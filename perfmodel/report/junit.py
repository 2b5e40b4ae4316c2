"""JUnit XML, which build servers read: test cases with one outcome each, in one suite. Characters that XML cannot hold
become `?`."""

import re
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence

from perfmodel import text

_NOT_IN_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def case_of(classname: str, name: str, time_ns: float | None = None) -> ET.Element:
    """A test case without an outcome yet; null where it took no time of its own."""
    took = {} if time_ns is None else {"time": f"{time_ns / text.NS_PER_S:.9f}"}
    return ET.Element("testcase", {"classname": _xml(classname), "name": _xml(name), **took})


def passed(case: ET.Element, words: str) -> ET.Element:
    """The case with these words as its output."""
    ET.SubElement(case, "system-out").text = _xml(words)
    return case


def skipped(case: ET.Element, message: str) -> ET.Element:
    """The case as one that was not judged."""
    ET.SubElement(case, "skipped", {"message": _xml(message)})
    return case


def failed(case: ET.Element, kind: str, message: str, words: str = "") -> ET.Element:
    """The case as one that failed by a condition, `kind`."""
    ET.SubElement(case, "failure", {"type": kind, "message": _xml(message)}).text = _xml(words) or None
    return case


def suite(name: str, said: Mapping[str, str], cases: Sequence[ET.Element]) -> str:
    """Test cases as one suite, with what is `said` of them all as its properties."""
    counts = {
        "name": _xml(name),
        "tests": str(len(cases)),
        "failures": str(sum(case.find("failure") is not None for case in cases)),
        "errors": "0",
    }
    suites = ET.Element("testsuites", counts)
    # Schemas in use know `skipped` of a suite, not of the suites together.
    n_skipped = str(sum(case.find("skipped") is not None for case in cases))
    found = ET.SubElement(suites, "testsuite", {**counts, "skipped": n_skipped})
    properties = ET.SubElement(found, "properties")
    for key, value in said.items():
        ET.SubElement(properties, "property", {"name": key, "value": _xml(value)})
    found.extend(cases)
    ET.indent(suites)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ET.tostring(suites, encoding="unicode") + "\n"


def _xml(words: str) -> str:
    return _NOT_IN_XML.sub("?", words)
