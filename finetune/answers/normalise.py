"""One spelling for what LaTeX, Unicode and keyboards write in many ways. No mathematics here, only text; linear in its length."""

import re
import unicodedata
from collections.abc import Callable

_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺", "0123456789-+")
_SYMBOLS = {
    "−": "-", "–": "-", "—": "-", "﹣": "-", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "÷": "/", "⁄": "/", "≤": r"\le ",
    "≥": r"\ge ", "≠": r"\ne ", "≈": r"\approx ", "∞": r"\infty ", "π": r"\pi ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ",
    "∅": r"\emptyset ", "Ø": r"\emptyset ", "±": r"\pm ", "∠": r"\angle ", "ℝ": r"\mathbb{R}", "°": r"^\circ ", "′": "'", "’": "'",
    "‘": "'", "“": '"', "”": '"', "、": ", ", "；": "; ", "，": ",", "。": ".", "：": ":", "（": "(", "）": ")", "【": "[", "】": "]",
    "￥": "¥", "％": "%", "θ": r"\theta ", "α": r"\alpha ", "β": r"\beta ", "λ": r"\lambda ", "\u200b": "", "\ufeff": "",
}  # fmt: skip
_SYMBOL = re.compile("|".join(map(re.escape, _SYMBOLS)))
_COMMANDS: list[tuple[str, str | Callable[[re.Match[str]], str]]] = [
    (r"\\(?:left|right|[bB]igg?[lrm]?|displaystyle|textstyle|limits|boldsymbol|cancel)(?![a-zA-Z])\s*\.?(?<!\s\.)", ""),
    (r"\\phantom\s*(?:\{[^{}]*\}|-|\w)", ""),
    (r"(?<!\\)\\!\s*|\{,\}\\!", lambda m: "," if m.group().startswith("{") else ""),
    (r"\{\s*,\s*\}", ","),
    (r"(?<!\\)\\(?:[,;:> ]|quad|qquad|hspace\{[^{}]*\}|hfill)(?![a-zA-Z])|~", " "),
    (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
    (r"\\(?:mbox|textbf|textit|textrm|textnormal|textsf|texttt|mathrm|operatorname\*?|mathit|mathsf|rm|bf)\s*(?=\{)", r"\\text"),
    (r"\\(?:mathbf|bm|vec|overline|overrightarrow)\s*\{([A-Za-z]+)\}", r"\1"),
    (r"\\(?:geqslant|geq)(?![a-zA-Z])", r"\\ge"),
    (r"\\(?:leqslant|leq)(?![a-zA-Z])", r"\\le"),
    (r"\\neq(?![a-zA-Z])", r"\\ne"),
    (r"\\lt(?![a-zA-Z])", "<"),
    (r"\\gt(?![a-zA-Z])", ">"),
    (r"\\varnothing(?![a-zA-Z])", r"\\emptyset"),
    (r"\\(?:degree|textdegree)(?![a-zA-Z])", r"^\\circ"),
    (r"\^\s*\{\s*\\circ\s*\}", r"^\\circ"),
    (r"\\(?:lbrace|lbrack)(?![a-zA-Z])", lambda m: r"\{" if "brace" in m.group() else "["),
    (r"\\(?:rbrace|rbrack)(?![a-zA-Z])", lambda m: r"\}" if "brace" in m.group() else "]"),
    (r"\\langle(?![a-zA-Z])", "("),
    (r"\\rangle(?![a-zA-Z])", ")"),
    (r"\\%", "%"),
    (r"\\begin\{cases\}(.*?)\\end\{cases\}", lambda m: re.sub(r"\\\\\s*", ", ", m.group(1))),
    (r"\\\{\s*[a-zA-Z]\s*(?::|\\mid|\||\\in\s*\\mathbb\s*\{?R\}?\s*(?::|\\mid|\|))(.*)\\\}$", r"\1"),
    (r"\\pmod\s*\{[^{}]*\}|\(\s*\\text\s*\{\s*mod\s*\}[^()]*\)", ""),
    (r"^\s*(?:about|approximately|roughly|around|大约|约)(?=[\s\d])|`", ""),
    (r"(?<!\d)(\d{0,30})\.(\d{0,30})\\(?:overline|bar|dot)\s*\{(\d{1,50})\}", lambda m: _repeating(m)),
    (r"\\\(|\\\)|\\\[|\\\]", " "),
]
_MISSING_BRACES = re.compile(r"\\frac\s*(?:\{([^{}]+)\}|(\w))\s*(?:\{([^{}]+)\}|(\w))")
_ROOT = re.compile(r"√\s*(?:\(([^()]*)\)|(\d+(?:\.\d+)?|[a-zA-Z]))|\\sqrt\s*(?=[\w])(\w)")


def normalise(text: str) -> str:
    r"""`text` with full-width characters, Unicode mathematics and LaTeX's spellings brought to one form.

    Currency dollars stay as `$`; the dollars that delimit a formula go. Full stops at the end go.
    """
    text = re.sub(r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺]+", lambda m: "^{" + m.group().translate(_SUPERSCRIPTS) + "}", text)
    text = re.sub(r"(\d?)([¼½¾⅐-⅞])", lambda m: (m.group(1) + " " if m.group(1) else "") + unicodedata.normalize("NFKC", m.group(2)), text)
    text = unicodedata.normalize("NFKC", _SYMBOL.sub(lambda m: _SYMBOLS[m.group()], text))
    text = _SYMBOL.sub(lambda m: _SYMBOLS[m.group()], text)  # NFKC itself makes some of them, e.g. the fraction slash
    if r"\begin" not in text:
        text = re.sub(r"\\\\(?=[a-zA-Z]{2,})", r"\\", text)  # LaTeX escaped once too often; in a matrix `\\` ends a row
    text = _dollars(text)
    for pattern, replacement in _COMMANDS:
        text = re.sub(pattern, replacement, text)
    text = _ROOT.sub(lambda m: rf"\sqrt{{{m.group(1) or m.group(2) or m.group(3)}}}", text)
    text = _MISSING_BRACES.sub(_braced, text)
    text = re.sub(r"\*\*(.+?)\*\*", r"\1", text)
    text = re.sub(r"\s+", " ", text).strip()
    return re.sub(r"(?<=\S)[.,;:]+$", "", text).strip()


def _repeating(match: re.Match[str]) -> str:
    r"""`0.1\overline{6}` as a fraction."""
    whole, fixed, period = match.group(1) or "0", match.group(2), match.group(3)
    numerator = int(whole + fixed + period) - int(whole + fixed)
    return rf"\frac{{{numerator}}}{{{(10 ** len(period) - 1) * 10 ** len(fixed)}}}"


def _braced(match: re.Match[str]) -> str:
    return rf"\frac{{{match.group(1) or match.group(2)}}}{{{match.group(3) or match.group(4)}}}"


def _dollars(text: str) -> str:
    r"""Drop the `$` that delimit formulas, keep those that mean a currency: `\$`, or an odd one out beside a number."""
    text = re.sub(r"\\\$(?!\s*[\d.\\-])", " ", text).replace(r"\$", "\0").replace("$$", " ")
    if text.count("$") % 2 == 0:
        return text.replace("$", " ").replace("\0", "$")
    if re.fullmatch(r"\s*-?\$[^$]*|[^$]*\d\s*\$\s*", text):
        return text.replace("\0", "$")
    return text.replace("$", " ").replace("\0", "$")


def unwrap_text(text: str) -> str:
    r"""`text` with each `\text{...}` replaced by its content."""
    return re.sub(r"\\text\s*\{([^{}]*)\}", r"\1", text)


def words(text: str) -> str:
    """The words of a text answer: lower case, no articles, punctuation or LaTeX."""
    text = re.sub(r"\\[a-zA-Z]+|[{}$^_]", " ", unwrap_text(text)).casefold()
    text = re.sub(r"[^\w\s.'+-]|(?<!\d)\.|\.(?!\d)|_", " ", text)
    return " ".join(word for word in text.split() if word not in {"a", "an", "the"})
