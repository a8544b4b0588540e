"""Personal data is replaced by tags and counted; what only looks like it stays."""

from __future__ import annotations

import hashlib
import random

import pytest

from megatron_slm.data.quality.personal import scrub


@pytest.mark.parametrize(
    ("text", "clean", "pattern"),
    [
        ("mail ann.lee+news@mail.example.co.uk.", "mail <EMAIL>.", "EMAIL"),
        ("<jürgen@müller.de>", "<<EMAIL>>", "EMAIL"),
        ("from 203.0.114.7:8080 and", "from <IPV4>:8080 and", "IPV4"),
        ("host 192.168.1.20.", "host <IPV4>.", "IPV4"),
        ("call (415) 555-2671 now", "call <PHONE> now", "PHONE"),
        ("415-555-2671", "<PHONE>", "PHONE"),
        ("1-415-555-2671", "<PHONE>", "PHONE"),
        ("415.555.2671.", "<PHONE>.", "PHONE"),
        ("+49 30 901820", "<PHONE>", "PHONE"),
        ("+44 (0)20 7946 0958,", "<PHONE>,", "PHONE"),
        ("+14155552671", "<PHONE>", "PHONE"),
        ("card 4111 1111 1111 1111, thanks", "card <CREDIT_CARD>, thanks", "CREDIT_CARD"),
        ("4111-1111-1111-1111", "<CREDIT_CARD>", "CREDIT_CARD"),
        ("5555555555554444", "<CREDIT_CARD>", "CREDIT_CARD"),
        ("2223003122003222", "<CREDIT_CARD>", "CREDIT_CARD"),
        ("3782 822463 10005", "<CREDIT_CARD>", "CREDIT_CARD"),
        ("6011111111111117", "<CREDIT_CARD>", "CREDIT_CARD"),
        ("to DE89 3704 0044 0532 0130 00 AND then", "to <IBAN> AND then", "IBAN"),
        ("GB82WEST12345698765432", "<IBAN>", "IBAN"),
        ("NO93 8601 1117 947", "<IBAN>", "IBAN"),
        ("SSN 536-90-4399.", "SSN <US_SSN>.", "US_SSN"),
    ],
)
def test_personal_data_becomes_a_tag(text: str, clean: str, pattern: str) -> None:
    assert scrub(text) == (clean, {pattern: 1})
    assert scrub(clean) == (clean, {}), "tags are left alone"


@pytest.mark.parametrize(
    "text",
    [
        "John 3:16, Psalm 119:105-112; 1 John 4:7-8; 2 Kings 25:27-30",
        "version 1.2.3, 1.2.3.post4, v1.2.3.4, 1.2.3.4.5, 2.0.0-rc.1, Python 3.11.4",
        "ISBN 978-3-16-148410-0, ISBN 0-306-40615-2, 9783161484100, ISSN 2049-3630",
        "2024-01-15, 15.01.2024, 01/15/2024, 20240115T101500+0100, 1999-12-31 23:59:59.999999",
        hashlib.sha256(b"x").hexdigest()
        + " "
        + hashlib.md5(b"y").hexdigest()
        + " 123e4567-e89b-12d3-a456-426614174000",
        "127.0.0.1, 0.0.0.0, 255.255.255.0, 999.1.1.1, 256.0.0.1",
        "4111 1111 1111 1112, 4111111111111112",  # Luhn fails.
        "1234567812345670, 9111111111111111",  # Luhn holds; no issuer begins so.
        "DE88 3704 0044 0532 0130 00, XY89370400440532013000",  # mod 97 fails; no such country.
        "666-12-3456, 900-12-3456, 123-00-4567, 123-45-0000, 12-345-6789",
        "x+1234567890, +1.23456789, -1.5, +12 apples, 3+4159265358, 1+1, +1",
        "@app.route, a @ b, user@localhost, x@y, W@x.T",
        "the years 1914 1918 1939 1945 and 123 456 7890 sheep, pi is 3.14159265358979323846",
        "pages 212-315-1234567, part 800-555-12345",
        "中文没有数字",
        "",
    ],
)
def test_what_only_looks_like_it_stays(text: str) -> None:
    assert scrub(text) == (text, {})


def test_several_in_one_text_are_counted_by_pattern() -> None:
    text = "a@b.org, c@d.org; 8.8.4.4; IBAN GB82 WEST 1234 5698 7654 32 DE89 3704 0044 0532 0130 00"
    clean, counts = scrub(text)
    assert clean == "<EMAIL>, <EMAIL>; <IPV4>; IBAN <IBAN> <IBAN>"
    assert counts == {"EMAIL": 2, "IPV4": 1, "IBAN": 2}


def test_a_random_number_is_rarely_a_card() -> None:
    state = random.Random(5)
    numbers = [str(state.randrange(10**15, 10**16)) for _ in range(5000)]
    taken = scrub(" x ".join(numbers))[1].get("CREDIT_CARD", 0)
    assert taken < 0.05 * len(numbers)


@pytest.mark.parametrize("unit", ["a", "1", "1.", "+1 ", "DE89", "a@", "a.", "1-", "(415) ", "4111 "])
def test_a_long_run_of_beginnings_is_no_trap(unit: str) -> None:
    # Time that grew with the square of the length would be minutes here.
    assert scrub(unit * (300_000 // len(unit)) + " a@b.org")[1]["EMAIL"] == 1
