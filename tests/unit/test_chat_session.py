"""The chat, on an engine that says what it is told to and a console that is a list."""

from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from dsv3.observe.metrics import Metrics
from dsv3.request import Completion, Request, RequestOutput
from dsv3.serve.chat import Chat
from dsv3.serve.conversation import OnFull
from dsv3.text.chat import ChatFormat
from dsv3.text.defaults import Defaults, Sampling
from dsv3.text.tokenizer import Tokenizer

DEMO = Path(__file__).parents[2] / "checkpoints" / "demo-v3"
TOKENIZER = Tokenizer.load(DEMO)
VOCAB_SIZE = 2048
THINKS = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
    "[assistant]{{ '<think>' if thinking else '' }}"
)
INTERRUPT = "^C"  # among the pieces of an answer: here the user presses it


class ToldEngine:
    """Answers with the pieces of text it is told to, a step each."""

    def __init__(self, answers: Sequence[Sequence[str]], max_seq_len: int = 1000) -> None:
        self.max_seq_len, self.vocab_size = max_seq_len, VOCAB_SIZE
        self.cache_tokens, self.metrics = 4096, Metrics()
        self.requests: list[Request] = []
        self.dropped: list[str] = []
        self.interrupted = False
        self._answers, self._left, self._said = deque(answers), deque[str](), ""

    @property
    def prompts(self) -> list[str]:
        return [TOKENIZER.decode(r.prompt_ids, False) for r in self.requests]

    def add(self, request: Request) -> None:
        self.requests.append(request)
        self._left, self._said = deque(self._answers.popleft()), ""

    def cancel(self, request_id: str) -> None:
        assert request_id == self.requests[-1].request_id
        self._left.clear()

    def drop_conversation(self, conversation_id: str) -> None:
        self.dropped.append(conversation_id)

    def has_work(self) -> bool:
        return bool(self._left)

    def step(self) -> list[RequestOutput]:
        if self._left[0] == INTERRUPT:
            self.interrupted = True
            return []
        request, text = self.requests[-1], self._left.popleft()
        if not self._said:
            self.metrics.pages_used, self.metrics.pages_idle, self.metrics.pages_free = 1, 1, 6
            self.metrics.prefill_tokens += 3
            self.metrics.reused_tokens += len(request.prompt_ids) - 3
        self._said += text
        output = RequestOutput(request_id=request.request_id, new_text=text)
        output.new_token_ids = TOKENIZER.encode(text, False)
        if not self._left:
            ids = TOKENIZER.encode(self._said, False)
            room = self.max_seq_len - len(request.prompt_ids)
            full = len(ids) >= min(room, request.params.max_tokens)
            output.completion = Completion(
                request_id=request.request_id,
                prompt_ids=request.prompt_ids,
                token_ids=ids,
                text=self._said,
                finish_reason="length" if full else "stop",
            )
        return [RequestOutput(request_id="another"), output]


class ListConsole:
    """Says the lines of a list, and notes all that it is shown."""

    help = "how to type"

    def __init__(self, engine: ToldEngine, lines: Sequence[str]) -> None:
        self._engine, self._lines = engine, deque(lines)
        self.answers: list[str] = [""]
        self.thoughts, self.shown = "", list[str]()

    def read(self) -> str | None:
        return self._lines.popleft() if self._lines else None

    def show(self, text: str) -> None:
        self.shown.append(text)

    def note(self, text: str) -> None:
        self.shown.append(text)

    def answer(self, text: str) -> None:
        self.answers[-1] += text

    def thought(self, text: str) -> None:
        self.thoughts += text

    def end_answer(self, remark: str) -> None:
        self.answers.append("")
        self.shown += [remark] if remark else []

    def interrupted(self) -> bool:
        found, self._engine.interrupted = self._engine.interrupted, False
        return found


def talk(
    lines: Sequence[str],
    answers: Sequence[Sequence[str]] = (),
    template: str | None = None,
    max_seq_len: int = 1000,
    on_full: OnFull = "drop",
    **defaults: object,
) -> tuple[ToldEngine, ListConsole]:
    """Have a chat; return what the engine heard and what the user saw."""
    tokenizer = Tokenizer.load(DEMO)
    tokenizer.chat_template = template or tokenizer.chat_template
    engine = ToldEngine(answers, max_seq_len)
    console = ListConsole(engine, lines)
    settings = replace(Defaults(flags=Sampling(temperature=0.0)), **defaults)
    Chat(engine, ChatFormat(tokenizer), settings, console, on_full).run("demo")
    return engine, console


def test_a_conversation_grows_turn_by_turn() -> None:
    engine, console = talk(["I am Anna.", "", "Who am I?"], [["Not", "ed."], ["Anna."]])
    assert console.answers == ["Noted.", "Anna.", ""]
    user, assistant, end = "<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>"
    assert engine.prompts[1] == f"{engine.prompts[0]}Noted.{end}{user}Who am I?{assistant}"
    assert {r.conversation_id for r in engine.requests} == {"chat-1"}
    assert engine.requests[0].params.max_tokens == 1000 - len(engine.requests[0].prompt_ids)
    assert engine.requests[0].params.seed != engine.requests[1].params.seed


def test_the_tokens_of_an_answer_stay_those_that_the_model_chose() -> None:
    """Its text might be cut into tokens otherwise; the cache holds the chosen ones."""
    chosen = [TOKENIZER.encode(letter, False)[0] for letter in "Noted"]
    assert TOKENIZER.encode("Noted", False) != chosen

    class Spelling(ToldEngine):
        def step(self) -> list[RequestOutput]:
            outputs = super().step()
            assert outputs[-1].completion is not None
            outputs[-1].completion.token_ids = chosen
            return outputs

    engine = Spelling([["Noted"], ["Yes."]])
    Chat(
        engine, ChatFormat(TOKENIZER), Defaults(), ListConsole(engine, ["I am Anna.", "Really?"])
    ).run("demo")
    first, second = (request.prompt_ids for request in engine.requests)
    assert second[: len(first) + len(chosen)] == first + chosen


def test_ctrl_c_keeps_what_was_said() -> None:
    engine, console = talk(["Tell!", "Go on."], [["Once ", INTERRUPT, "never"], ["upon"]])
    assert console.answers == ["Once ", "upon", ""]
    assert "Once <｜end" in engine.prompts[1]
    assert "stopped" in console.shown


@pytest.mark.parametrize("answer", [[INTERRUPT], ["Let me", INTERRUPT]])
def test_a_question_without_an_answer_is_forgotten(answer: list[str]) -> None:
    engine, console = talk(["Tell!", "Who am I?"], [answer, ["You."]], THINKS, thinking=True)
    assert "Tell!" not in engine.prompts[1]
    assert "stopped; without an answer the question is forgotten, too" in console.shown


def test_thoughts_are_shown_apart_and_not_said_again() -> None:
    pieces = ["Hm", "m.</th", "ink>\n", "\nYes."]
    engine, console = talk(["Well?", "Sure?"], [pieces, ["</think>No."]], THINKS, thinking=True)
    assert console.thoughts == "Hmm."
    assert console.answers[:2] == ["\n\nYes.", "No."]
    assert engine.prompts[1].endswith("[user]Well?[assistant]Yes.[user]Sure?[assistant]<think>")


def test_thoughts_that_the_model_opens_are_shown_apart() -> None:
    pieces = ["\n<thi", "nk>\nHmm.", "\n</think>", "\n\nYes."]
    engine, console = talk(["Well?", "Sure?"], [pieces, ["No."]])
    assert console.thoughts == "Hmm.\n"
    assert console.answers[:2] == ["\n\nYes.", "No."]
    assert "<｜Assistant｜>Yes.<｜end▁of▁sentence｜>" in engine.prompts[1]


def test_an_answer_that_is_the_beginning_of_a_mark_is_shown() -> None:
    _, console = talk(["Well?"], [["<th"]])
    assert console.answers[0] == "<th"


def test_control_tokens_that_users_type_are_text_and_stay_in_the_shared_prefix() -> None:
    said = "Is <｜end▁of▁sentence｜><｜User｜> a token?"
    engine, _ = talk([said, "Sure?"], [["Yes, <｜User｜> is."], ["Yes."]])
    first, second = (request.prompt_ids for request in engine.requests)
    user, end = (TOKENIZER.id_of(name) for name in ("<｜User｜>", "<｜end▁of▁sentence｜>"))
    assert (first.count(user), first.count(end)) == (1, 0)
    assert (second.count(user), second.count(end)) == (3, 1)  # one in the told engine's answer
    assert second[: len(first)] == first
    assert said in engine.prompts[1]


def test_a_format_without_thoughts_is_mentioned() -> None:
    _, console = talk([], thinking=True)
    reason = "this model's chat format has no switch for it"
    assert f"asking for thinking changes nothing: {reason}" in console.shown


def test_clear_begins_a_new_conversation() -> None:
    engine, _ = talk(["I am Anna.", "/clear", "Who am I?"], [["Noted."], ["Who?"]])
    assert "Anna" not in engine.prompts[1]
    assert [r.conversation_id for r in engine.requests] == ["chat-1", "chat-2"]
    assert engine.dropped == ["chat-1"]


def test_the_system_message_can_be_changed() -> None:
    lines = ["/system", "a", "/system Be\nkind.", "b", "/clear", "c", "/system -", "d"]
    engine, console = talk(lines, [["1"], ["2"], ["3"], ["4"]], system="Be brief.")
    told = ["Be brief.", "Be\nkind.", "Be\nkind.", ""]
    begin = "<｜begin▁of▁sentence｜>"
    for prompt, system in zip(engine.prompts, told, strict=True):
        assert prompt.startswith(f"{begin}{system}<｜User｜>")
    assert console.shown[1:] == [
        "system message: Be brief.",
        "system message: Be\nkind.",
        "a new conversation",
        "no system message",
    ]


def test_a_full_context_is_said_in_words() -> None:
    engine, console = talk(
        ["I am Anna.", "Who am I?", "/clear", "Hi.", "long " * 40],
        [["word " * 60], ["Hello."]],
        max_seq_len=40,
        on_full="stop",
    )
    assert len(engine.requests) == 2
    full, refused, _, too_long = console.shown[1:]
    assert full == "the context of 40 tokens is full; /clear begins a new conversation"
    assert refused.startswith("not sent: the conversation with it has ")
    assert refused.endswith(
        "the context holds 40, question and answer together; /clear begins a new one, --on-full "
        "drop drops the oldest turns"
    )
    assert too_long.endswith(", --on-full drop drops the oldest turns")


@pytest.mark.parametrize("answer", ["word " * 6, "Hm."])
def test_the_oldest_turns_are_dropped_from_a_full_context(answer: str) -> None:
    lines = [f"Message {i}?" for i in range(30)]
    engine, console = talk(lines, [[answer]] * 30, max_seq_len=200, system="Be brief.")
    dropped = [i for i, text in enumerate(console.shown) if "dropped" in text]
    assert dropped
    assert len(dropped) < 8  # several turns at once: most prompts begin as the one before
    assert console.shown[dropped[0]].endswith(" dropped: the context of 200 tokens is full")
    sizes = [len(request.prompt_ids) for request in engine.requests]
    assert len(sizes) == 30
    assert max(sizes) <= 175  # an eighth is for the answer
    falls = [after for before, after in pairwise(sizes) if after < before]
    assert len(falls) == len(dropped)
    assert all(60 < after <= 100 for after in falls)
    for i, prompt in enumerate(engine.prompts):
        assert prompt.startswith("<｜begin▁of▁sentence｜>Be brief.<｜User｜>Message ")
        assert prompt.endswith(f"<｜User｜>Message {i}?<｜Assistant｜>")


def test_an_answer_that_fills_the_context_is_dropped_before_the_next_message() -> None:
    lines = ["I am Anna.", "Who am I?", "long " * 60, "Hi."]
    engine, console = talk(lines, [["word " * 60], ["You."], ["Hello."]], max_seq_len=40)
    full, dropped, too_long = console.shown[1:]
    assert full == "the context of 40 tokens is full; the next message drops the oldest turns"
    assert dropped == "the oldest turn was dropped: the context of 40 tokens is full"
    assert too_long.startswith("not sent: it has ")
    assert "Who am I?" in engine.prompts[2]  # a message that is too long drops nothing


def test_a_message_is_sent_as_it_was_typed() -> None:
    lines = ["\tall:\n\t\tgcc a.c\n", " \t\n", "  Is that right? "]
    engine, _ = talk(lines, [["It is."], ["It is."]])
    assert engine.prompts[0].endswith("<｜User｜>\tall:\n\t\tgcc a.c\n<｜Assistant｜>")
    assert engine.prompts[1].endswith("<｜User｜>  Is that right? <｜Assistant｜>")


def test_regenerate_answers_again_with_other_random_numbers() -> None:
    answers = [["Noted."], ["You?"], ["Anna."], ["Anna!"], ["Fine."]]
    lines = ["/regenerate", "I am Anna.", "Who am I?", "/regenerate", "/regenerate", "Good."]
    engine, console = talk(lines, answers, flags=Sampling(temperature=1.0))
    assert console.shown[1] == "there is no message to answer again"
    second, third, fourth = engine.requests[1:4]
    assert second.prompt_ids == third.prompt_ids == fourth.prompt_ids
    assert [second.answer, third.answer, fourth.answer] == [0, 1, 2]
    assert second.params == third.params
    assert "Anna!" in engine.prompts[4]
    assert "You?" not in engine.prompts[4]


def test_regenerate_at_temperature_zero_says_that_nothing_changes() -> None:
    _, console = talk(["Hi.", "/regenerate"], [["Yes."], ["Yes."]])
    assert console.shown[1] == "the temperature is 0: the answer will be the same"
    _, console = talk(["Hi.", "/set temperature 1", "/regenerate"], [["Yes."], ["No."]])
    assert console.shown[1:] == ["temperature: 1"]


def test_regenerate_answers_a_question_whose_answer_was_stopped() -> None:
    lines = ["I am Anna.", "Who am I?", "/regenerate", "/regenerate", "Sure?"]
    answers = [["Noted."], [INTERRUPT], ["Anna."], [INTERRUPT], ["Yes."]]
    engine, console = talk(lines, answers)
    assert engine.prompts[1] == engine.prompts[2] == engine.prompts[3]
    assert "Anna.<｜end" in engine.prompts[4]
    assert [text for text in console.shown if text.startswith("stopped")] == [
        "stopped; without an answer the question is forgotten, too",
        "stopped; the answer before stays",
    ]


def test_undo_forgets_turns_one_by_one() -> None:
    lines = ["I am Anna.", "Who am I?", "/undo", "Hi.", "/undo", "/undo", "/undo", "Hello."]
    engine, console = talk(lines, [["Noted."], ["Anna."], ["Hi."], ["Hello."]])
    assert "Who am I?" not in engine.prompts[2]
    assert "Noted." in engine.prompts[2]
    assert engine.prompts[3] == "<｜begin▁of▁sentence｜><｜User｜>Hello.<｜Assistant｜>"
    forgotten = ["forgotten: Who am I?", "forgotten: Hi.", "forgotten: I am Anna."]
    assert console.shown[1:] == [*forgotten, "there is nothing to undo"]


def test_values_are_set_by_the_rules_of_rows() -> None:
    lines = [
        "/set temperature 0.7",
        "/set top_k=3.0",
        "/set --top-k -1",
        "/set max-tokens 9",
        "/set stop END",
        "/set thinking on",
        "Hi.",
        "/set stop -",
        "/set temperature -",
        '/set stop ["a", "b"]',
        "/set min_p",
    ]
    engine, console = talk(lines, [["Yes."]], THINKS)
    params = engine.requests[0].params
    assert (params.temperature, params.top_k, params.max_tokens) == (0.7, 0, 9)
    assert params.stop == ("END",)
    assert engine.prompts[0].endswith("<think>")
    assert console.shown[1:] == [
        "temperature: 0.7",
        "top_k: 3",
        "top_k: 0",
        "max_tokens: 9",
        'stop: ["END"]',
        "thinking: true",
        "stop: none",
        "temperature: 0.0",
        'stop: ["a", "b"]',
        "min_p: 0.0",
    ]


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("temperatur 1", "temperatur is no value of a chat; did you mean temperature?"),
        ("temp 1", "temp is no value of a chat; did you mean temperature?"),
        ("max_new_tokens 1", "max_new_tokens is no value of a chat; did you mean max_tokens?"),
        ("xyz 1", "xyz is no value of a chat; /set shows all values"),
        ("temperature hot", 'temperature="hot" must be a number'),
        ("temperature NaN", "temperature=nan must be between 0 and 100"),
        ("temperature 101", "temperature=101 must be between 0 and 100"),
        ("temperature null", "temperature needs a value; - is the one at the start of the chat"),
        ("max_tokens 5.5", "max_tokens=5.5 must be a whole number from 0 to 2147483647"),
        ("top_p 0", "top_p=0 must be above 0 and at most 1"),
        ("stop ['a']", None),
        ('stop ["a", 5]', 'stop=["a", 5] must be a text or a list of texts, none empty'),
        ('stop ""', 'stop="" must be a text or a list of texts, none empty'),
        ("seed " + "9" * 20, f"seed={'9' * 20} must be a whole number from -92"),
        ("thinking perhaps", 'thinking="perhaps" must be true or false'),
    ],
)
def test_a_wrong_value_is_told_in_one_line(text: str, error: str | None) -> None:
    _, console = talk([f"/set {text}"])
    if error is None:
        assert console.shown[1].startswith("stop: ")
    else:
        assert console.shown[1].startswith(f"not set: {error}")
    assert len(console.shown) == 2


def test_set_shows_all_values() -> None:
    _, console = talk(["/set"], flags=Sampling(temperature=0.5), seed=7)
    shown = dict(line.split(maxsplit=1) for line in console.shown[1].splitlines())
    assert shown["temperature"] == "0.5"
    assert shown["max_tokens"] == "all there is room for"
    assert (shown["seed"], shown["stop"], shown["thinking"]) == ("7", "none", "false")


def test_a_seed_that_is_set_gives_the_same_answers_again() -> None:
    lines = ["/set seed 5", "Hi.", "And?", "/set seed 5", "Ho.", "/undo", "/set seed 6", "Hm."]
    engine, _ = talk(lines, [["Yes."]] * 4)
    assert [text in engine.prompts[3] for text in ("Hi.", "And?", "Ho.")] == [True, True, False]
    seeds = [request.params.seed for request in engine.requests]
    assert seeds[0] == seeds[2]
    assert len(set(seeds)) == 3


def test_a_stop_text_does_not_come_back_as_tokens() -> None:
    class Stopping(ToldEngine):
        def step(self) -> list[RequestOutput]:
            outputs = super().step()
            assert outputs[-1].completion is not None
            outputs[-1].completion.token_ids += TOKENIZER.encode("END", False)
            return outputs

    engine = Stopping([["Noted."], ["Yes."]])
    lines = ["/set stop END", "I am Anna.", "Really?"]
    Chat(engine, ChatFormat(TOKENIZER), Defaults(), ListConsole(engine, lines)).run("demo")
    assert "END" not in engine.prompts[1]


def test_help_tells_commands_and_keys() -> None:
    _, console = talk(["/help", "/regenrate"])
    assert all(name in console.shown[1] for name in ("/undo", "/regenerate", "/set NAME VALUE"))
    assert console.shown[1].endswith("how to type")
    wrong = "/regenrate is not a command (did you mean /regenerate?); /help lists them"
    assert console.shown[2] == wrong


def test_a_message_longer_than_the_context_must_be_shorter() -> None:
    engine, console = talk(["long " * 60], max_seq_len=40)
    assert not engine.requests
    assert console.shown[-1].startswith("not sent: it has ")
    assert console.shown[-1].endswith("it must be shorter")


def test_an_answer_cut_short_says_how_to_allow_more() -> None:
    flags = Sampling(max_tokens=2)
    _, console = talk(["Tell!"], [["one two"]], flags=flags)
    assert console.shown[-1].endswith("/set max_tokens allows more")


def test_what_is_no_command_is_not_sent_unless_it_looks_like_text() -> None:
    lines = ["/foo bar", "/usr/bin is what?", " /clear", "/exit", "never"]
    engine, console = talk(lines, [["A folder."], ["Nothing."]])
    assert console.shown[1:] == ["/foo is not a command; /help lists them"]
    assert [p.count("/clear") for p in engine.prompts] == [0, 1]


def test_stats_count_prompts_and_answers() -> None:
    _, console = talk(["/stats", "I am Anna.", "Who am I?", "/stats"], [["Noted."], ["Anna."]])
    assert console.shown[1] == "no answers yet"
    lines = console.shown[2].splitlines()
    assert "3 computed" in lines[0]
    assert "first token after" in lines[1] and "tok/s" in lines[1]
    assert lines[2].startswith("all 2") and "6 computed" in lines[2]
    assert lines[3].startswith("context ") and lines[3].endswith(" of 1,000 tokens")
    assert lines[4] == "cache          1,024 of 4,096 tokens"


def test_stats_after_undo_are_those_of_the_turns_that_are_left() -> None:
    _, console = talk(["I am Anna.", "/stats", "Who?", "/undo", "/stats"], [["Noted."], ["You."]])
    before, after = (text.splitlines()[3] for text in console.shown if "context  " in text)
    assert before == after


def test_thinking_that_cannot_be_switched_is_mentioned_when_it_is_set() -> None:
    _, console = talk(["/set thinking on"])
    reason = "this model's chat format has no switch for it"
    assert console.shown[1:] == [
        "thinking: true",
        f"asking for thinking changes nothing: {reason}",
    ]
    always = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}<think>"
    _, console = talk(["/set thinking off"], template=always)
    assert console.shown[2].startswith("thinking cannot be switched off: ")


def test_a_template_without_end_leaves_the_chat_open() -> None:
    engine, console = talk(["Hi", "Hi again"], template="{{ 'a' * 10 ** 10 }}")
    assert engine.requests == []
    reason = "not sent: {}: chat template: more than 1,024 MiB of memory"
    assert console.shown[1:] == [reason.format(DEMO / "tokenizer_config.json")] * 2
