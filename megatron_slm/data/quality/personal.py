"""What looks like personal data, replaced by tags.

Patterns see shapes, not people: a name or a street stays, and so does a telephone number without country code in a
shape that is not North American, because nothing tells it from other numbers. What has a checksum must pass it.
"""

from __future__ import annotations

import functools
import ipaddress
import re
from collections.abc import Callable
from dataclasses import dataclass

IBAN_LENGTHS = {
    15: "NO",
    16: "BE",
    18: "DK FI FO GL NL SD",
    19: "MK SI",
    20: "AT BA EE KZ LT LU MN XK",
    21: "CH HR LI LV",
    22: "BG BH CR DE GB GE IE ME RS VA",
    23: "AE GI IL IQ OM SO TL",
    24: "AD CZ ES MD PK RO SA SE SK TN VG",
    25: "LY PT ST",
    26: "IS TR",
    27: "BI DJ FR GR IT MC MR SM",
    28: "AL AZ BY CY DO GT HU LB NI PL SV",
    29: "BR EG PS QA UA",
    30: "JO KW MU",
    31: "MT SC",
    32: "LC",
    33: "RU",
}
"""Characters of an IBAN by country (SWIFT, IBAN registry)."""

CARD_ISSUERS = r"""
    4\d{12}(?:\d{3}){0,2}                                  # Visa
    | (?:5[1-5]\d\d|222[1-9]|22[3-9]\d|2[3-6]\d\d|27[01]\d|2720)\d{12}   # Mastercard
    | 3[47]\d{13}                                          # American Express
    | 3(?:0[0-5]|[689]\d)\d{11}                            # Diners Club
    | 35(?:2[89]|[3-8]\d)\d{12}                            # JCB
    | 6(?:011|5\d\d|4[4-9]\d)\d{12}                        # Discover
    | 62\d{14,17}                                          # UnionPay
"""
"""First digits and lengths that issuers use."""


@dataclass(frozen=True)
class Pattern:
    """A shape of personal data: what finds it, and what a match must pass besides."""

    name: str
    expression: re.Pattern[str]
    holds: Callable[[str], bool] = lambda found: True

    @property
    def tag(self) -> str:
        """What it is replaced by."""
        return f"<{self.name}>"


def scrub(text: str) -> tuple[str, dict[str, int]]:
    """``text`` with tags in place of personal data, and the replacements by pattern (only those that occurred).

    Scrubbing what was scrubbed changes nothing.
    """
    counts: dict[str, int] = {}
    if re.search(r"[\d@]", text) is None:
        return text, counts
    for pattern in patterns():

        def replacement(match: re.Match[str], pattern: Pattern = pattern) -> str:
            if not pattern.holds(match[0]):
                return match[0]
            counts[pattern.name] = counts.get(pattern.name, 0) + 1
            return pattern.tag

        text = pattern.expression.sub(replacement, text)
    return text, counts


@functools.cache
def patterns() -> tuple[Pattern, ...]:
    """All patterns, in the order they are applied.

    Each begins behind what is no part of it, so that a long run of characters is not tried from each of its places.
    """
    return (
        Pattern("EMAIL", re.compile(r"(?<![\w.%+-])[\w.%+-]{1,64}@(?:[\w-]{1,63}\.){1,8}[^\W\d_]{2,24}(?![\w-])")),
        Pattern("IBAN", _iban(), _passes_mod_97),
        Pattern(
            "CREDIT_CARD",
            re.compile(
                r"(?<![\w.+-])(?<!\d )"
                r"(?:\d{13,19}|\d{4}([ -])\d{4}\1\d{4}\1\d{4}(?:\1\d{3})?|\d{4}([ -])\d{6}\2\d{4,5})"
                r"(?![\w-]|[ .]\d)"
            ),
            _is_card,
        ),
        Pattern("US_SSN", re.compile(r"(?<![\w.+-])(?!000|666|9)\d{3}-(?!00)\d\d-(?!0000)\d{4}(?![\w-]|\.\d)")),
        Pattern("IPV4", re.compile(r"(?<![\w.-])\d{1,3}(?:\.\d{1,3}){3}(?![\w-]|\.\w)"), _is_address),
        Pattern("PHONE", _phone(), _is_phone),
    )


def _iban() -> re.Pattern[str]:
    """Each country's own length, in one piece or in groups of four."""
    forms = []
    for length, countries in IBAN_LENGTHS.items():
        groups, rest = divmod(length - 4, 4)
        tail = rf"(?: ?[A-Z0-9]{{{rest}}})" if rest else ""
        forms.append(rf"(?:{countries.replace(' ', '|')})\d\d(?: ?[A-Z0-9]{{4}}){{{groups}}}{tail}")
    return re.compile(rf"(?<![\w-])(?=[A-Z]{{2}}\d\d)(?:{'|'.join(forms)})(?![\w-])")


def _phone() -> re.Pattern[str]:
    """With a country code, or North American with its punctuation (no run of bare digits)."""
    abroad = r"\+[1-9]\d{0,2}(?:[ .-]?\(?\d{1,6}\)?){1,6}"
    american = r"(?:1[ .-])?(?:\([2-9]\d\d\) ?|[2-9]\d\d[.-])[2-9]\d\d[ .-]\d{4}"
    return re.compile(rf"(?<![\w.+/(-])(?:{abroad}|{american})(?![\w-]|\.\d)")


def _passes_mod_97(found: str) -> bool:
    """ISO 13616: the country and check digits moved to the end, letters as 10 to 35, the remainder is 1."""
    compact = found.replace(" ", "")
    return int("".join(str(int(character, 36)) for character in compact[4:] + compact[:4])) % 97 == 1


def _is_card(found: str) -> bool:
    """An issuer's number that passes Luhn's check (ISO/IEC 7812-1)."""
    digits = re.sub("[ -]", "", found)
    doubled = [int(digit) * (2 if place % 2 else 1) for place, digit in enumerate(reversed(digits))]
    valid = sum(value - 9 if value > 9 else value for value in doubled) % 10 == 0
    return valid and re.fullmatch(CARD_ISSUERS, digits, re.VERBOSE) is not None


def _is_address(found: str) -> bool:
    """An address that some machine may have: no loopback, mask or multicast group, of which manuals are full."""
    try:
        address = ipaddress.IPv4Address(found)
    except ValueError:
        return False
    return not (address.is_loopback or address.is_unspecified or address.is_multicast or address.is_reserved)


def _is_phone(found: str) -> bool:
    """8 to 15 digits (ITU-T E.164), and no decimal number with a sign."""
    digits = sum(character.isdigit() for character in found)
    return 8 <= digits <= 15 and re.fullmatch(r"\+\d+\.\d+", found) is None
