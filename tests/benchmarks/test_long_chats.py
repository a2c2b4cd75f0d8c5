"""The same questions as they are and behind a long chat."""

from __future__ import annotations

import json

import pytest

from benchmarks import long_chats

ASKED = [f"question {index}?" for index in range(6)]
ANSWERS = [
    {"id": f"{index}-q", "text": f"answer {index}", "prompt_token_ids": [1] * 10, "token_ids": [2] * (10 * index)}
    for index in range(6)
]


def test_a_chat_has_other_questions_up_to_a_size():
    chat = long_chats.chat_before(2, ASKED, ANSWERS, 100)
    asked = [message["content"] for message in chat[::2]]
    assert asked
    assert "question 2?" not in asked
    assert [message["role"] for message in chat] == ["user", "assistant"] * len(asked)
    assert [message["content"] for message in chat[1::2]] == [text.replace("question", "answer")[:-1] for text in asked]
    assert sum(10 + 10 * int(text[9]) for text in asked) <= 100
    assert chat == long_chats.chat_before(2, ASKED, ANSWERS, 100)


def test_every_question_comes_in_every_form(tmp_path, capsys):
    prompts, answers, out = (tmp_path / name for name in ("prompts", "answers", "out"))
    prompts.write_text("".join(json.dumps({"turns": [text, "more"], "category": "all"}) + "\n" for text in ASKED))
    answers.write_text("".join(json.dumps(answer) + "\n" for answer in reversed(ANSWERS)))
    given = ["--prompts", str(prompts), "--answers", str(answers), "--out", str(out), "--limit", "2"]
    assert long_chats.main([*given, "--history-tokens", "60"]) == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    names = ["as they are"] * 2 + ["behind a chat of 60 tokens"] * 2
    assert [line["category"] for line in lines] == names
    assert [line["messages"][-1]["content"] for line in lines] == ASKED[:2] * 2
    assert "4 prompts" in capsys.readouterr().out


def test_answers_of_other_prompts_are_refused(tmp_path, capsys):
    prompts, answers = tmp_path / "prompts", tmp_path / "answers"
    prompts.write_text("".join(json.dumps({"turns": [text]}) + "\n" for text in ASKED))
    answers.write_text(json.dumps(ANSWERS[0]) + "\n")
    with pytest.raises(SystemExit):
        long_chats.main(["--prompts", str(prompts), "--answers", str(answers), "--out", str(tmp_path / "out")])
    assert "has none for 5 prompts, the first is line 2" in capsys.readouterr().err
