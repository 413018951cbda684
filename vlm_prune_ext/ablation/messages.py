"""What a study says, in English and Korean."""

from __future__ import annotations

LANGUAGES = ("en", "ko")

_TEXTS: dict[str, tuple[str, str]] = {
    "title": ("VLM captioning ablation", "VLM 캡셔닝 절제 실험"),
    "models": ("models", "모델"),
    "runs": ("{methods} ({runs} runs)", "{methods} (실행 {runs}개)"),
    "methods": ("methods", "방법"),
    "data": ("data", "데이터"),
    "rows": ("{path}, {rows} rows", "{path}, {rows}개 행"),
    "skipped": (
        "{path}, {rows} rows ({skipped} skipped)",
        "{path}, {rows}개 행 ({skipped}개 건너뜀)",
    ),
    "columns": ("columns", "열"),
    "output": ("output", "출력 폴더"),
    "batch": ("batch size", "배치 크기"),
    "tokens": ("new tokens", "최대 생성 토큰"),
    "row_skipped": (
        "row {index} skipped: {image!r}: {reason}",
        "{index}번 행 건너뜀: {image!r}: {reason}",
    ),
    "more_skipped": ("... and {count} more rows", "... 외 {count}개 행"),
    "starts": ("{name} starts at {time}", "{name} 시작 {time}"),
    "known": ("{done} of {rows} rows are there already", "{rows}개 행 중 {done}개는 이미 있음"),
    "kept": ("{name} was finished before", "{name} 이미 완료됨"),
    "done": ("{name} done at {time} ({seconds})", "{name} 완료 {time} ({seconds})"),
    "failed": (
        "{name} failed at {time} ({seconds}): {reason}",
        "{name} 실패 {time} ({seconds}): {reason}",
    ),
    "log": ("log: {path}", "로그: {path}"),
    "rows_failed": ("rows without an answer: {count}", "답을 얻지 못한 행: {count}개"),
    "missing": ("{metric} is missing: {reason}", "{metric} 없음: {reason}"),
    "per_sample": (
        "{seconds:.3f} s per sample, peak memory {peak}",
        "샘플당 {seconds:.3f}초, 최대 메모리 {peak}",
    ),
    "gpu": (
        "GPU memory in use before and after: {before} and {after}",
        "GPU 메모리 사용량 전/후: {before} / {after}",
    ),
    "left": (
        "{name}: {done} of {rows}, {left} left",
        "{name}: {rows}개 중 {done}개, 남은 시간 {left}",
    ),
    "end": ("finished", "전체 완료"),
    "interrupted": (
        "interrupted: the same command goes on from here",
        "중단됨: 같은 명령으로 이어서 실행",
    ),
    "time": ("total time", "총 시간"),
    "counts": ("done {done}, failed {failed}", "완료 {done}, 실패 {failed}"),
    "result": ("result", "결과"),
    "files": ("files", "파일"),
}


class Messages:
    """Texts of one language.

    Args:
        language: one of :data:`LANGUAGES`.
    """

    def __init__(self, language: str = "en") -> None:
        self.place = LANGUAGES.index(language)

    def __call__(self, key: str, **values: object) -> str:
        """A text with its values filled in."""
        return _TEXTS[key][self.place].format(**values)


KEYS = tuple(_TEXTS)
"""Names of all texts."""


def texts(key: str) -> dict[str, str]:
    """One text in every language, nothing filled in."""
    return dict(zip(LANGUAGES, _TEXTS[key], strict=True))
