import pytest

from hfgpt.data.encodings import decode, guess_encoding

KOREAN = "안녕하세요. 오늘은 날씨가 좋습니다.\n첫째 줄과 둘째 줄이 있습니다 (2024).\n"
JAPANESE = "これは日本語のテキストです。カタカナもあります。\n"
CHINESE = "这是一个中文文本,我们用它来测试编码。\n"
TRADITIONAL = "這是一個中文文本,我們用它來測試編碼。\n"


@pytest.mark.parametrize(
    ("text", "codec", "name"),
    [
        (KOREAN, "cp949", "CP949"),
        (KOREAN * 5000, "cp949", "CP949"),
        ("words in ASCII\n" * 10_000 + KOREAN, "cp949", "CP949"),
        ("똠방각하 펲시콜라 믜 뷁\n", "cp949", "CP949"),  # syllables that EUC-KR lacks
        ("text,n\n한국어,1\n", "euc_kr", "CP949"),
        (JAPANESE, "cp932", "Shift-JIS"),
        (JAPANESE, "euc_jp", "EUC-JP"),
        (CHINESE, "gb18030", "GB18030"),
        (TRADITIONAL, "big5", "Big5"),
        ("Café au lait, déjà vu, naïve\n", "latin-1", "windows-1252"),
        ("\u201cquoted\u201d \u2013 it\u2019s\n", "cp1252", "windows-1252"),
        (KOREAN, "utf-16", "UTF-16"),
        ("plain words", "utf-16", "UTF-16"),
        ("plain words", "utf-32", "UTF-32"),
        ("plain words", "utf-16-le", "UTF-16LE"),
        ("plain words", "utf-16-be", "UTF-16BE"),
    ],
)
def test_bytes_that_are_not_utf8_are_refused_with_the_way_to_make_them_so(text, codec, name):
    with pytest.raises(ValueError, match=r"^a\.txt is not UTF-8: ") as refusal:
        decode(text.encode(codec), "a.txt")

    advice = f"It looks like {name}: iconv -f {name.lower()} -t utf-8 makes it UTF-8."
    assert str(refusal.value).endswith(advice)
    assert text.encode(codec).decode(name) == text or codec == "utf-16"


@pytest.mark.parametrize("broken_at", [0, 1, 50, 200])
@pytest.mark.parametrize("text", [KOREAN, JAPANESE, CHINESE, TRADITIONAL, "déjà vu, naïveté " * 9])
def test_a_byte_that_is_broken_in_a_text_of_utf8_is_no_other_encoding(text, broken_at):
    raw = (text * 9).encode()

    assert guess_encoding(raw[:broken_at] + b"\xff" + raw[broken_at:]) is None


@pytest.mark.parametrize("raw", [b"abc\xff", b"\x80", b"a\xed\xa0\x80", "привет мир".encode("cp1251"), b"\xfe" * 9])
def test_what_cannot_be_told_is_not_guessed(raw):
    with pytest.raises(ValueError, match=r"byte 0x.. at offset \d+ \(.*\)\. Save it as UTF-8\.$"):
        decode(raw, "a.txt")


@pytest.mark.parametrize("text", ["", "\0", "a\0b", KOREAN, "\ufeffa", "é" * 9])
def test_utf8_is_read_as_it_is(text):
    assert decode(text.encode(), "a.txt") == text
