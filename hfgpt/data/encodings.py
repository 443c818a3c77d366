"""Bytes to text: UTF-8 and nothing else; what is not is refused with its place and, where it can be told, its encoding.

To guess and go on would change a text without a word.
"""

import re

SAMPLE_BYTES = 65_536
BYTE_ORDER_MARKS = (
    (b"\xff\xfe\0\0", "UTF-32"),
    (b"\0\0\xfe\xff", "UTF-32"),
    (b"\xff\xfe", "UTF-16"),
    (b"\xfe\xff", "UTF-16"),
)
# An encoding, that whose letters it must decode to, which they are, and the least share of them among its letters.
TYPICAL_LETTERS = (
    ("CP949", "cp949", "[\uac00-\ud7a3]", 0.8),
    ("Shift-JIS", "cp932", "[\u3040-\u30fe]", 0.3),
    ("EUC-JP", "euc_jp", "[\u3040-\u30fe]", 0.3),
    ("GB18030", "gb2312", "[\u4e00-\u9fff]", 0.9),
    ("Big5", "big5", "[\u4e00-\u9fff]", 0.9),
)
# Latin letters with accents, quotation marks and dashes.
WESTERN = "[\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u00fe\u2018\u2019\u201c\u201d\u2013\u2014\u2026]{1,2}"


def decode(raw: bytes, name: str, offset: int = 0) -> str:
    """Read bytes that stand at `offset` in a file, changing nothing: line ends, NUL and BOM stay.

    Raises:
        ValueError: they are not UTF-8.
    """
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        at = error.start
        guess = guess_encoding(raw if at < SAMPLE_BYTES else raw[at : at + SAMPLE_BYTES])
        place = f"byte 0x{raw[at]:02x} at offset {offset + at} ({error.reason})"
        raise ValueError(f"{name} is not UTF-8: {place}. {advice(guess)}") from error
    for half, guess in ((raw[1::2], "UTF-16LE"), (raw[::2], "UTF-16BE")):
        # Every second byte of English in UTF-16, which decodes as UTF-8.
        if 2 < len(half) < 1.5 * half.count(0) and raw.count(0) <= len(half):
            raise ValueError(f"{name} is not UTF-8: {raw.count(0)} of {len(raw)} bytes are 0. {advice(guess)}")
    return text


def advice(encoding: str | None) -> str:
    if encoding is None:
        return "Save it as UTF-8."
    return f"It looks like {encoding}: iconv -f {encoding.lower()} -t utf-8 makes it UTF-8."


def guess_encoding(raw: bytes) -> str | None:
    """Name the encoding of bytes that are not UTF-8, or None where it cannot be told."""
    for mark, encoding in BYTE_ORDER_MARKS:
        if raw.startswith(mark):
            return encoding
    sample = raw[:SAMPLE_BYTES]
    for encoding, codec, letters, least in TYPICAL_LETTERS:
        # What is cut off at the end of the sample is dropped with the bytes that the codec does not know.
        text = sample.decode(codec, errors="replace")
        found = [character for character in text if character > "\x7f" and character.isalpha()]
        is_known = text.count("\ufffd") <= (len(raw) > SAMPLE_BYTES)
        if is_known and found and len(re.findall(letters, text)) >= least * len(found):
            return encoding
    # Western letters and quotation marks stand alone among ASCII; those of other alphabets make whole words.
    high = re.findall(rb"[\x80-\xff]+", sample)
    is_western = all(re.fullmatch(WESTERN, run.decode("cp1252", "replace")) for run in high)
    return "windows-1252" if high and is_western else None
