"""Formats of the public dialogue sets: a sample of each is recognized as its own and as no other, and read in full."""

import inspect
import json
import re
from collections.abc import Iterator
from dataclasses import fields
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from metakern.dialogue import readers
from metakern.dialogue.config import Config
from metakern.dialogue.readers import READERS, Dialogue, Rows, Turn, dialogue, formats, read
from metakern.dialogue.tasks import load_split
from metakern.errors import DataError, UserError

DATA = Path(__file__).parent / "data"
BOT = {"bot": "bot"}


def lines(*records: object) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def talk(task_id: str, dialogue_id: str, *texts: str, first: str = "user", **meta: str) -> Dialogue:
    """Return a dialogue in which user and bot alternate."""
    speakers = ("user", "bot") if first == "user" else ("bot", "user")
    turns = tuple(Turn(speakers[i % 2], text) for i, text in enumerate(texts))
    return Dialogue(task_id, dialogue_id, turns, {"bot": "bot", **meta})


def turns(*texts: object, speaker: str = "speaker", text: str = "utterance", names: tuple = ("USER", "SYSTEM")) -> list:
    return [{speaker: names[i % 2], text: said, "frames": [{"service": "x"}]} for i, said in enumerate(texts)]


SGD = [
    {"dialogue_id": "1_00000", "services": ["Banks_1"], "turns": turns("Hi", "Which account?", "The first.", "Done.")},
    {"dialogue_id": "1_00001", "services": ["Banks_1", "Homes_2"], "turns": turns("Hi", "Yes?")},
    {"dialogue_id": "1_00002", "services": ["RideSharing_12"], "turns": turns("A car", "Where to?")},
    {"dialogue_id": "1_00003", "services": ["Banks_1"], "turns": turns("Hi", None)},
    {"dialogue_id": "1_00004", "services": ["Banks_1"], "turns": turns("Hi", "Ho", names=("USER", "THIRD"))},
    {"dialogue_id": "1_00005", "turns": turns("Hi", "Ho")},
]
MULTIWOZ_21 = {
    "SNG01.json": {
        "goal": {"taxi": {}, "hotel": {"info": {"area": "east"}}, "message": ["You want …"], "topic": {"taxi": False}},
        "log": [
            {"text": "A hotel, please.", "metadata": {}},
            {"text": "Which?\n", "metadata": {"hotel": {}}},
            {"text": "Any.", "metadata": {}},
        ],
    },
    "MUL02.json": {
        "goal": {"train": {"info": {}}, "attraction": {"info": {}}},
        "log": [{"text": "A train and a museum."}, {"text": "Sure."}],
    },
    "SNG03.json": {"goal": {"taxi": {}}, "log": [{"text": "Hi"}, {"text": "Ho"}]},
    "SNG04.json": {"goal": {"taxi": {"info": {}}}, "log": [{"text": "Hi"}, {"metadata": {}}]},
    "SNG05.json": ["Hi", "Ho"],
}
MULTIWOZ_22 = [
    {"dialogue_id": "PMUL1.json", "services": ["train", "hotel"], "turns": turns("A train", "To?", "Ely")},
    {"dialogue_id": "SNG2.json", "services": ["taxi"], "turns": turns("A taxi", "Now?")},
    {"dialogue_id": "SNG3.json", "services": [], "turns": turns("Hello", "Hello")},
    {"dialogue_id": "SNG4.json", "services": ["taxi"], "turns": ["A taxi"]},
    {"dialogue_id": "SNG5.json", "services": None, "turns": turns("Hello", "Hello")},
]
TASKMASTER = [
    {
        "conversation_id": "dlg-1",
        "instruction_id": "restaurant-table-2",
        "utterances": [
            {"index": 0, "speaker": "USER", "text": "A table.", "segments": []},
            {"index": 1, "speaker": "ASSISTANT", "text": "For how many?"},
            {"index": 2, "speaker": "ASSISTANT", "text": "And when?"},
            {"index": 3, "speaker": "USER", "text": "Two, now."},
        ],
    },
    {
        "conversation_id": "dlg-2",
        "instruction_id": "movie-finder",
        "utterances": [{"speaker": "USER", "text": "A film?"}, {"speaker": "ASSISTANT", "text": "Alien."}],
    },
    {"conversation_id": "dlg-3", "instruction_id": "movie-finder", "utterances": [{"speaker": "USER"}]},
    {"conversation_id": "dlg-4", "instruction_id": None, "utterances": []},
]
METALWOZ = [
    {"id": "d1", "domain": "BUS", "task_id": "t1", "turns": ["Hello how may I help you?", "A bus", "Which?"]},
    {"id": "d2", "domain": "BUS", "task_id": "t2", "turns": ["Hello how may I help you?", "Another bus"]},
    {"id": "d3", "domain": "BUS", "task_id": "t2", "turns": ["Hello", 3]},
    {"id": "d4", "domain": "BUS", "task_id": None, "turns": ["Hello", "Ho"]},
]
METALWOZ_TASKS = lines({"task_id": "t1", "domain": "BUS", "user_role": "…", "bot_role": "…", "bot_prompt": "…"})
PERSONACHAT = {
    "train": [
        {
            "personality": ["i like tea .", "i ski ."],
            "utterances": [
                {"history": ["hi"], "candidates": ["no .", "hello ."]},
                {"history": ["hi", "hello .", "tea ?"], "candidates": ["why ?", "yes , please ."]},
            ],
        },
        {"personality": ["i ski ."], "utterances": []},
        {"personality": None, "utterances": [{"history": ["hi"], "candidates": ["hello ."]}]},
    ],
    "valid": [
        {"personality": ["i ski ."], "utterances": [{"history": ["__SILENCE__"], "candidates": ["hey"]}]},
        {"personality": ["i ski ."], "utterances": [{"history": ["hi", "ho", "snow ?"], "candidates": ["yes"]}]},
    ],
}
PERSONACHAT_ROWS = [
    {"personality": ["i ski ."], "history": ["hi"], "candidates": ["ho"], "conv_id": 0},
    {"personality": ["i ski ."], "history": ["hi", "ho", "snow ?"], "candidates": ["no", "yes"], "conv_id": 0},
    {"personality": ["i ski ."], "history": ["hi"], "candidates": ["hey"], "conv_id": 1},
    {"personality": ["i cook ."], "history": ["hi", "hey", "soup ?"], "candidates": ["stew"], "conv_id": 2},
]
FBDIALOG = """\
1 your persona: i ski .
2 your persona: i like tea .
3 partner's persona: i cook .
4 hi\thello .\t\tno .|hello .
5 tea ?\tyes ,\\nplease .\t\twhy ?|yes , please .
1 partner's persona: i cook .
2 __SILENCE__\thello , chef .\t\thello , chef .
3 soup ?\tstew .
"""
PARLAI = """\
text:Hello.\tlabels:Hi.|Hello!\treward:1.0\tlabel_candidates:Hi.|Ho.\tid:ann
text:How are\\nyou?\tlabels:Fine: thanks.\tepisode_done:True
id:bob\ttext:Bye.\teval_labels:Bye!\tepisode_done:True
text:Alone.\tepisode_done:True
text:Late.\tlabels:Never.
"""
CONVERSATIONS = [
    {
        "dialog": [[{"id": "ann", "text": "Hello."}, {"id": "bob", "text": "Hi."}], [{"id": "ann", "text": "Bye."}]],
        "context": [],
        "topic": "tea",
    },
    {"dialog": [[{"id": "ann", "text": "Hello."}, {"id": "bob", "text": "Hi."}]]},
    {"dialog": [[{"id": "ann"}, {"id": "bob", "text": "Hi."}]]},
    {"dialog": "Hello."},
]
DAILYDIALOG = "Hi , Jim . __eou__ Hello . How are you ? __eou__ Fine . __eou__\nWork ? __eou__ Sure . __eou__\n"
DAILYDIALOG_PARLAI = [
    {"fold": "train", "topic": "Work", "dialogue": [{"text": "Hi .", "emotion": "none"}, {"text": "Hello ."}]},
    {"fold": "train", "topic": "9", "dialogue": [{"text": "News ?"}, {"text": "No ."}, {"text": "Ah ."}]},
    {"fold": "train", "topic": "Work", "dialogue": [{"text": None}]},
]
DAILYDIALOG_ROWS = [{"dialog": ["Hi .", "Hello ."], "act": [1, 1], "emotion": [0, 0]}]
EMPATHETIC = """\
conv_id,utterance_idx,context,prompt,speaker_idx,utterance,selfeval,tags
hit:0_conv:1,1,sentimental,I remember_comma_ once,1,I remember "fireworks_comma_ alone.,5|5|5_2|2|5,
hit:0_conv:1,2,sentimental,I remember_comma_ once,0,"With a friend_pipe_love?,5|5|5_2|2|5,
hit:0_conv:1,3,sentimental,I remember_comma_ once,1,A friend.,5|5|5_2|2|5,,One.|Two.
hit:1_conv:2,1,afraid,It was dark,3,It was dark.,5|5|5_5|5|5,
hit:1_conv:2,2,afraid,It was dark,2,Oh no!,5|5|5_5|5|5,
hit:1_conv:3,one,afraid,It was dark,2,Oh no!,5|5|5_5|5|5,
"""
EMPATHETIC_KEYS = ("conv_id", "utterance_idx", "context", "prompt", "speaker_idx", "utterance", "selfeval", "tags")
EMPATHETIC_ROWS = [
    dict(zip(EMPATHETIC_KEYS, ("c1", 1, "proud", "I won", 1, "I won_comma_ again.", "", ""), strict=True)),
    dict(zip(EMPATHETIC_KEYS, ("c1", 2, "proud", "I won", 0, "Well done!", "", ""), strict=True)),
]
CROSSWOZ = {
    "391": {
        "sys-usr": [43, 18],
        "goal": [
            [1, "餐馆", "人均消费", "50-100元", False],
            [2, "景点", "名称", "", False],
            [1, "餐馆", "名称", "", 0],
        ],
        "type": "独立多领域",
        "task description": ["你要去一个餐馆"],
        "messages": [
            {"content": "你好", "role": "usr", "dialog_act": []},
            {"content": "您好!", "role": "sys", "dialog_act": []},
            {"content": "谢谢", "role": "usr", "dialog_act": []},
        ],
    },
    "392": {
        "type": None,
        "goal": None,
        "messages": [{"content": "你好", "role": "usr"}, {"content": "好", "role": "sys"}],
    },
    "393": {"type": "单领域", "messages": [{"content": "你好", "role": "boss"}]},
    "394": "你好",
}
UBUNTU = """\
Context,Utterance,Label
"why , oh why ? __eou__ it hangs __eou__ __eot__ which version ? __eou__ __eot__ ",the latest __eou__,1
hello __eou__ __eot__,random __eou__,0
"say ""hi"" __eou__ __eot__ hi __eou__ __eot__ thanks __eou__ __eot__",np __eou__ bye __eou__,1
"""
UBUNTU_TEST = 'Context,Ground Truth Utterance,Distractor_0\n"it hangs __eou__ __eot__",reboot __eou__,no __eou__\n'
UBUNTU_CHAT = """\
2004-11-23T11:49:00.000Z\tann\t\tanyone knows why ?
2004-11-23T11:50:00.000Z\tann\t\tit "hangs
2004-11-23T11:51:00.000Z\tbob\tann\treboot
2004-11-23T11:52:00.000Z\tann\tbob\tthanks\tso much
"""


def star(number: int, *tasks: str, level: str = "Complete", happy: bool = True) -> dict[str, Any]:
    def event(agent: str, action: str, text: str | None = None, **more: object) -> dict[str, object]:
        return {"Agent": agent, "Action": action, "UnixTime": 1, **({"Text": text} if text else {}), **more}

    return {
        "DialogueID": number,
        "CompletionLevel": level,
        "FORMAT-VERSION": 7,
        "Events": [
            event("UserGuide", "instruct", "Act confused."),
            event("User", "utter", "My doctor?"),
            event("Wizard", "request_suggestions", "name"),
            event("Wizard", "pick_suggestion", "Could I get your name, please?", ActionLabel="ask_name"),
            event("User", "utter", "Alexis"),
            event("Wizard", "query", APIName="doctor"),
            event("KnowledgeBase", "return_item", Item={}),
            event("Wizard", "utter", "Take your medicine."),
            event("User", "complete"),
        ],
        "Scenario": {
            "Domains": sorted({task.split("_")[0] if task != "trivia" else None for task in tasks}),
            "Happy": happy,
            "MultiTask": len(tasks) > 1,
            "WizardCapabilities": [{"Domain": task.split("_")[0], "Task": task} for task in tasks],
            "WizardTask": "Inform the user.",
        },
    }


STAR_TEXTS = ("My doctor?", "Could I get your name, please?", "Alexis", "Take your medicine.")
CLINC = {
    "val": [["how do you say hi", "translate"], ["freeze my card", "freeze_account"]],
    "oos_val": [["what is the sky", "oos"]],
    "train": [["lock my account", "freeze_account"], ["no intent"]],
}
CLINC_DOMAINS = {"banking": ["freeze_account", "routing"], "travel": ["translate"]}
BANKING = 'text,category\nWhere is my card?,card_arrival\n"No, where?",card_arrival\n'
HWU = (
    "userid;answerid;scenario;intent;status;answer_annotation;notes;suggested_entities;answer_normalised;answer;question\n"
    '1;1;alarm;set;;"wake me [time : early]";;;"wake me early";Wake me, early;"Write what; you say"\n'
    "1;2;audio;volume_mute;;quiet;;;quiet;quiet;Write\n"
    "1;3;audio;volume_mute;;quiet;;;;;Write\n"
)
FAQ = """\
question,answer,bot
Open now?,"Yes, until ""six"".",bakery
Open now?,No.,dentist
When?,,dentist
When?,At nine.,
"""
CHAT_LOG = """\
Conversation ID;Time;Role;Message
7;09:00;customer;Is it there?
8;09:01;Agent;Hello!
7;09:02;agent;"Wait;
I look."
8;09:03;customer;Where is it?
7;09:04;agent;Today.
9;09:05;customer;Anybody?
9;09:06;;Gone.
"""

# format, files, dialogues, what is skipped
SAMPLES: dict[str, tuple[str, dict[str, object], list[Dialogue], dict[str, int]]] = {
    "sgd": (
        "sgd",
        {"train/dialogues_001.json": SGD, "train/schema.json": [{"service_name": "Banks_1", "slots": []}]},
        [
            talk("Banks_1", "1_00000", "Hi", "Which account?", "The first.", "Done.", group="Banks"),
            talk("RideSharing_12", "1_00002", "A car", "Where to?", group="RideSharing"),
        ],
        {"of several services": 1, "without services and turns": 1, "without turns of speaker and utterance": 2},
    ),
    "multiwoz 2.1": (
        "multiwoz",
        {
            "attraction_db.json": [{"name": "all saints church", "area": "centre"}],
            "data.json": MULTIWOZ_21,
            "valListFile.json": "SNG01.json\nMUL02.json\n",
        },
        [
            talk("hotel", "SNG01.json", "A hotel, please.", "Which?", "Any."),
            talk("attraction+train", "MUL02.json", "A train and a museum.", "Sure."),
        ],
        {"without a domain": 1, "without domains, speakers and texts": 2},
    ),
    "multiwoz 2.2": (
        "multiwoz",
        {
            "dialog_acts.json": {"PMUL1.json": {"0": {"dialog_act": {}, "span_info": []}}},
            "train/dialogues_001.json": MULTIWOZ_22,
            "schema.json": [{"service_name": "hotel", "slots": []}],
        },
        [talk("hotel+train", "PMUL1.json", "A train", "To?", "Ely"), talk("taxi", "SNG2.json", "A taxi", "Now?")],
        {"without a domain": 1, "without domains, speakers and texts": 2},
    ),
    "taskmaster": (
        "taskmaster",
        {"ontology.json": {"restaurant": [{"required": ["name"]}]}, "self-dialogs.json": TASKMASTER},
        [
            talk("restaurant-table", "dlg-1", "A table.", "For how many?\nAnd when?", "Two, now."),
            talk("movie-finder", "dlg-2", "A film?", "Alien."),
        ],
        {"without an instruction_id": 1, "without utterances of speaker and text": 1},
    ),
    "metalwoz": (
        "metalwoz",
        {"dialogues/BUS.txt": lines(*METALWOZ), "tasks.txt": METALWOZ_TASKS},
        [
            talk("t1", "d1", "Hello how may I help you?", "A bus", "Which?", first="bot", group="BUS"),
            talk("t2", "d2", "Hello how may I help you?", "Another bus", first="bot", group="BUS"),
        ],
        {"without the keys domain and task_id": 1, "without turns of text": 1},
    ),
    "personachat": (
        "personachat",
        {"personachat.json": PERSONACHAT},
        [
            talk("i like tea . i ski .", "personachat:0", "hi", "hello .", "tea ?", "yes , please ."),
            talk("i ski .", "personachat:2", "hi", "ho", "snow ?", "yes"),
        ],
        {"with fewer than 2 turns": 1, "without personality, history and candidates": 2},
    ),
    "personachat rows": (
        "personachat",
        {"rows.jsonl": lines(*PERSONACHAT_ROWS)},
        [
            talk("i ski .", "rows:0", "hi", "ho", "snow ?", "yes"),
            talk("i ski .", "rows:1", "hi", "hey"),
            talk("i cook .", "rows:2", "hi", "hey", "soup ?", "stew"),
        ],
        {},
    ),
    "fbdialog": (
        "personachat",
        {"train_both_original.txt": FBDIALOG},
        [
            talk("i like tea . i ski .", "train_both_original:1", "hi", "hello .", "tea ?", "yes ,\nplease ."),
            talk("i cook .", "train_both_original:6", "hello , chef .", "soup ?", "stew .", first="bot"),
        ],
        {},
    ),
    "fbdialog without personas": (
        "personachat",
        {"train_none_original.txt": "1 hi\thello .\t\tno .|hello .\n2 tea ?\tyes .\t\tno .|yes .\n"},
        [talk("train_none_original", "train_none_original:1", "hi", "hello .", "tea ?", "yes .")],
        {},
    ),
    "parlai": (
        "parlai",
        {"mine.txt": PARLAI},
        [
            talk("mine", "mine:1", "Hello.", "Hi.", "How are\nyou?", "Fine: thanks."),
            talk("mine", "mine:3", "Bye.", "Bye!"),
            talk("mine", "mine:5", "Late.", "Never."),
        ],
        {"with fewer than 2 turns": 1},
    ),
    "parlai conversations": (
        "parlai",
        {"chats.jsonl": lines(*CONVERSATIONS)},
        [
            dialogue("tea", "chats:1", [("ann", "Hello."), ("bob", "Hi."), ("ann", "Bye.")], {"bot": "bob"}),
            dialogue("chats", "chats:2", [("ann", "Hello."), ("bob", "Hi.")], {"bot": "bob"}),
        ],
        {"without a dialog of id and text": 2},
    ),
    "dailydialog": (
        "dailydialog",
        {
            "dialogues_act.txt": "3 4 1\n2 1\n",
            "dialogues_text.txt": DAILYDIALOG,
            "dialogues_topic.txt": "1\n8\n",
            "train/dialogues_train.txt": DAILYDIALOG,
        },
        [
            talk("Ordinary Life", "dialogues_text:1", "Hi , Jim .", "Hello . How are you ?", "Fine ."),
            talk("Work", "dialogues_text:2", "Work ?", "Sure ."),
        ],
        {},
    ),
    "dailydialog by splits": (
        "dailydialog",
        {
            "test/dialogues_act_test.txt": "2 1\n",
            "test/dialogues_test.txt": "Work ? __eou__ Sure . __eou__\n",
            "train/dialogues_train.txt": DAILYDIALOG,
            "dialogues_topic.txt": "1\n8\n",
        },
        [
            talk("dialogues_test", "dialogues_test:1", "Work ?", "Sure ."),
            talk("dialogues_train", "dialogues_train:1", "Hi , Jim .", "Hello . How are you ?", "Fine ."),
            talk("dialogues_train", "dialogues_train:2", "Work ?", "Sure ."),
        ],
        {},
    ),
    "dailydialog of ParlAI": (
        "dailydialog",
        {"train.json": lines(*DAILYDIALOG_PARLAI)},
        [talk("Work", "train:1", "Hi .", "Hello ."), talk("Politics", "train:2", "News ?", "No .", "Ah .")],
        {"without a dialogue of texts": 1},
    ),
    "dailydialog rows": (
        "dailydialog",
        {"daily.jsonl": lines(*DAILYDIALOG_ROWS)},
        [talk("daily", "daily:1", "Hi .", "Hello .")],
        {},
    ),
    "empathetic": (
        "empathetic",
        {"train.csv": EMPATHETIC},
        [
            talk(
                "sentimental",
                "hit:0_conv:1",
                'I remember "fireworks, alone.',
                '"With a friend|love?',
                "A friend.",
            ),
            talk("afraid", "hit:1_conv:2", "It was dark.", "Oh no!"),
        ],
        {"without context, utterance_idx and utterance": 1},
    ),
    "empathetic rows": (
        "empathetic",
        {"rows.json": EMPATHETIC_ROWS},
        [talk("proud", "c1", "I won, again.", "Well done!")],
        {},
    ),
    "crosswoz": (
        "crosswoz",
        {"database/hotel_db.json": [["北京", {"名称": "北京"}]], "train.json": CROSSWOZ},
        [talk("独立多领域", "391", "你好", "您好!", "谢谢")],
        {"without a type": 1, "without messages of role and content": 2},
    ),
    "ubuntu": (
        "ubuntu",
        {"test.csv": UBUNTU_TEST, "train.csv": UBUNTU},
        [
            talk("test", "test:2", "it hangs", "reboot"),
            talk("train", "train:2", "why , oh why ?\nit hangs", "which version ?", "the latest", first="bot"),
            talk("train", "train:4", 'say "hi"', "hi", "thanks", "np\nbye"),
        ],
        {"with a reply drawn at random": 1},
    ),
    "ubuntu chats": (
        "ubuntu",
        {"dialogs/3/1.tsv": UBUNTU_CHAT, "dialogs/3/2.tsv": UBUNTU_CHAT.split("\n")[0]},
        [
            Dialogue(
                "bob",
                "3/1",
                (Turn("ann", 'anyone knows why ?\nit "hangs'), Turn("bob", "reboot"), Turn("ann", "thanks\tso much")),
                {"bot": "bob"},
            )
        ],
        {"with fewer than 2 turns": 1},
    ),
    "star": (
        "star",
        {
            "apis/dbs/bank.json": [{"Name": "x"}],
            "dialogues/1.json": star(1, "doctor_followup", happy=False),
            "dialogues/2.json": star(2, "weather", "bank_balance"),
            "dialogues/3.json": star(3, "weather", level="DisconnectDuringDialogue"),
            "dialogues/4.json": star(4, "trivia"),
            "dialogues/5.json": star(5),
            "dialogues/6.json": {**star(6, "weather"), "Events": None},
            "tasks/weather/responses.json": {"ask_name": "Name?"},
        },
        [
            talk("doctor_followup", "1", *STAR_TEXTS, domain="doctor", happy="false", single_task="true"),
            talk("bank_balance+weather", "2", *STAR_TEXTS, domain="bank+weather", happy="true", single_task="false"),
            talk("trivia", "4", *STAR_TEXTS, domain="", happy="true", single_task="true"),
        ],
        {"that broke off": 1, "without Scenario and Events": 2},
    ),
    "clinc": (
        "intents",
        {"data_full.json": CLINC, "data_small.json": CLINC, "domains.json": CLINC_DOMAINS},
        [
            talk("travel", "data_full:val:0", "how do you say hi", "translate"),
            talk("banking", "data_full:val:1", "freeze my card", "freeze_account"),
            talk("banking", "data_full:train:0", "lock my account", "freeze_account"),
        ],
        {"of no domain": 1, "without a text and an intent": 1},
    ),
    "banking": (
        "intents",
        {"categories.json": '["card_arrival"]', "train.csv": BANKING},
        [
            talk("train", "train:2", "Where is my card?", "card_arrival"),
            talk("train", "train:3", "No, where?", "card_arrival"),
        ],
        {},
    ),
    "hwu": (
        "intents",
        {"hwu.csv": HWU},
        [
            talk("alarm", "hwu:2", "Wake me, early", "alarm_set"),
            talk("audio", "hwu:3", "quiet", "audio_volume_mute"),
        ],
        {"without a text and an intent": 1},
    ),
    "faq": (
        "csv",
        {"faq.csv": FAQ},
        [
            talk("bakery", "faq:2", "Open now?", 'Yes, until "six".'),
            talk("dentist", "faq:3", "Open now?", "No."),
        ],
        {"rows without a question and an answer": 1, "rows without a task": 1},
    ),
    "chat log": (
        "csv",
        {"log.csv": CHAT_LOG},
        [
            talk("log", "log:7", "Is it there?", "Wait;\nI look.\nToday."),
            talk("log", "log:8", "Hello!", "Where is it?", first="bot"),
        ],
        {
            "rows without a conversation, a speaker and a text": 1,
            "without a turn of a bot, assistant or agent (--reader-options bot_speaker=NAME)": 1,
        },
    ),
    "intent rows": (
        "intents",
        {"mine.jsonl": lines({"utterance": "hi", "intent": "greeting", "domain": "chat"})},
        [talk("chat", "mine:1", "hi", "greeting")],
        {},
    ),
    "messages": (
        "messages",
        {
            "mine.jsonl": lines(
                {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}
            )
        },
        [dialogue("mine", "mine:1", [("user", "Hi"), ("assistant", "Ho")], {"bot": "assistant"})],
        {},
    ),
    "prompt and completion": (
        "messages",
        {"mine.jsonl": lines({"prompt": "Hi", "completion": "Ho", "source": "x", "label": "y"})},
        [dialogue("mine", "mine:1", [("user", "Hi"), ("assistant", "Ho")], {"bot": "assistant"})],
        {},
    ),
    "sharegpt": (
        "sharegpt",
        {
            "mine.json": [
                {"id": "a_0", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]}
            ]
        },
        [dialogue("mine", "mine:1", [("user", "Hi"), ("assistant", "Ho")], {"bot": "assistant"})],
        {},
    ),
    "chitchat": (
        "chitchat",
        {
            "talks.json": {
                "c1": {"messages": [[{"sender": who, "text": who}] for who in "abab"], "prompt": "Tea?", "ratings": {}}
            }
        },
        [dialogue("Tea?", "c1", [(who, who) for who in "abab"], {"bot": "b"})],
        {},
    ),
    "chatterbot": (
        "chatterbot",
        {"english/food.yml": "categories:\n- food\nconversations:\n- - Hungry?\n  - No\n"},
        [talk("english/food", "english/food/0", "Hungry?", "No", group="english")],
        {},
    ),
}
# The formats of these samples are JSON records that may also be rows in memory.
AS_ROWS = {
    "sgd": SGD,
    "multiwoz 2.2": MULTIWOZ_22,
    "taskmaster": TASKMASTER,
    "metalwoz": METALWOZ,
    "personachat rows": PERSONACHAT_ROWS,
    "parlai conversations": CONVERSATIONS,
    "dailydialog of ParlAI": DAILYDIALOG_PARLAI,
    "dailydialog rows": DAILYDIALOG_ROWS,
    "empathetic rows": EMPATHETIC_ROWS,
    "intent rows": [{"utterance": "hi", "intent": "greeting", "domain": "chat"}],
}


def write(folder: Path, sample: str) -> str:
    for name, content in SAMPLES[sample][1].items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
        (folder / name).write_text(text, "utf-8")
    return str(folder)


def test_every_format_has_a_sample() -> None:
    assert {SAMPLES[sample][0] for sample in SAMPLES} == set(formats())


@pytest.mark.parametrize("sample", SAMPLES)
@pytest.mark.parametrize("chosen", ["auto", "its own"])
def test_a_set_is_read_in_full(tmp_path: Path, sample: str, chosen: str) -> None:
    name, contents, expected, skipped = SAMPLES[sample]
    source = write(tmp_path, sample) + ("/" + next(iter(contents)) if name == "chitchat" else "")
    found = read(source, "auto" if chosen == "auto" else name)
    assert list(found) == expected
    assert {reason: n for reason, n in found.skipped.items() if not reason.startswith("files ")} == skipped


@pytest.mark.parametrize("sample", SAMPLES)
def test_a_file_is_recognized_as_its_own_format_and_as_no_other(
    tmp_path: Path, sample: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, contents, expected, _ = SAMPLES[sample]
    write(tmp_path, sample)
    ids = {talk.dialogue_id for talk in expected}
    others = {key: found for key, found in READERS.items() if key != name}
    recognized = 0
    for content in contents:
        try:
            found = read(str(tmp_path / content))
        except DataError:
            found = None
        recognized += found is not None and bool(ids & {talk.dialogue_id for talk in found})
        with monkeypatch.context() as patched:
            patched.setattr(readers, "READERS", others)
            with pytest.raises(DataError, match=r"must be in a known format|must be an object|must be JSON"):
                readers._recognize(tmp_path / content)
    assert recognized


@pytest.mark.parametrize(("one", "other"), list(product(AS_ROWS, repeat=2)))
def test_records_of_one_format_are_not_those_of_another(one: str, other: str) -> None:
    sniff = READERS[SAMPLES[other][0]].sniff
    assert sniff is not None
    assert sniff(AS_ROWS[one][0]) is (SAMPLES[one][0] == SAMPLES[other][0])


@pytest.mark.parametrize("sample", AS_ROWS)
@pytest.mark.parametrize("kind", [list, iter])
def test_rows_in_memory_are_read_like_records(sample: str, kind: Any) -> None:
    name, _, expected, skipped = SAMPLES[sample]
    for chosen in ("auto", name):
        found = read(kind(AS_ROWS[sample]), chosen)
        assert [talk.turns for talk in found] == [talk.turns for talk in expected]
        assert found.skipped == skipped
        assert found.summary().startswith("dataset: ")


class Dataset:
    """What a `datasets.Dataset` has of use here."""

    class Classes:
        names = ("card_arrival", "card_lost")

    builder_name = "banking77"

    def __init__(self) -> None:
        self.features = {"text": object(), "label": self.Classes()}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        yield from [{"text": "Where is it?", "label": 0}, {"text": "Gone!", "label": 1}]
        yield from [{"text": "?", "label": -1}, {"text": "?", "label": None}]


@pytest.mark.parametrize(
    ("record", "format"),
    [
        ({"messages": [], "text": "Hi", "category": "chat"}, "messages"),
        ({"conversations": [], "prompt": "Hi", "completion": "Ho"}, "sharegpt"),
        ({"text": "Hi", "label": "chat"}, None),
        ({"prompt": "Hi"}, None),
        ({"1": {"messages": [{"role": "user", "content": "Hi"}]}}, None),
        ({"services": ["Banks_1", "hotel"], "turns": []}, None),
        ({"dialog": ["Hi", "Ho"]}, None),
        ({"utterances": [], "personality": []}, "personachat"),
        ({"utterances": []}, None),
        ({"train": [["Hi"]]}, None),
    ],
)
def test_records_that_are_alike_are_told_apart(record: dict[str, Any], format: str | None) -> None:
    assert [name for name, found in READERS.items() if found.sniff and found.sniff(record)] == [format] * bool(format)


def test_class_labels_of_a_dataset_are_named() -> None:
    found = read(Dataset(), "intents")
    assert [(d.task_id, d.turns[1].text) for d in found] == [("banking77", "card_arrival"), ("banking77", "card_lost")]
    assert found.skipped == {"without a text and an intent": 2}


@pytest.mark.parametrize(
    ("source", "format", "message"),
    [
        (
            {"train": [], "test": []},
            "auto",
            "read: source must be one split of a dataset, got a dictionary of train, test",
        ),
        ([{"a": 1}], "auto", "dataset: must be in a known format, got another"),
        ([], "messages", "dataset: must hold a dialogue, got an empty file"),
        ([{"messages": []}, 3], "messages", "dataset: row 2 must be a dictionary, got int"),
        (7, "auto", "read: source must be a text or rows, got int"),
        (Path("x"), "auto", "read: source must be a text or rows, got "),
        ([{"a": 1}], "chatterbot", "chatterbot: must be read from a file or directory, got rows in memory"),
        ([{"a": 1}], "chitchat", "dataset: must be a file in this format, got rows in memory"),
    ],
)
def test_other_objects_are_errors_of_one_line(source: Any, format: str, message: str) -> None:
    with pytest.raises(DataError, match=re.escape(message)) as error:
        read(source, format)
    assert "\n" not in str(error.value)


def test_nested_columns_of_a_dataset_are_read() -> None:
    spoken = {"turn_id": ["0", "1"], "speaker": [0, 1], "utterance": ["A train", "To?"]}
    rows = [{"dialogue_id": "PMUL1.json", "services": ["train"], "turns": spoken}]
    assert list(read(rows)) == [talk("train", "PMUL1.json", "A train", "To?")]


@pytest.mark.parametrize(
    ("format", "name", "text", "message"),
    [
        ("sgd", "a.json", '[{"dialogue_id": "1", "services": ["A_1"], "tur', ":1: must be JSON, got "),
        ("multiwoz", "a.json", '{"a": {"log": [', ":1: must be JSON, got "),
        ("taskmaster", "a.json", "[3]", ":1: must be an object with utterances, got int"),
        ("metalwoz", "a.txt", "Hello\n", ":1: must be JSON, got "),
        ("personachat", "a.txt", "1 hi\tho\nhi\tho\n", "a.txt:2: must begin with a number and a space, got 'hi\\tho'"),
        ("parlai", "a.txt", "text:a\tlabels:b\nlabels:b\n", "a.txt:2: must have a field text:…, got 'labels:b'"),
        ("dailydialog", "a.txt", "a __eou__ b\n\nab\n", "a.txt:3: must have __eou__ after each turn, got 'ab'"),
        ("empathetic", "a.csv", EMPATHETIC[:300], "a.csv:4: must have 8 columns, got "),
        ("crosswoz", "a.json", "[1]", "must be an object of dialogues, got list"),
        (
            "ubuntu",
            "a.csv",
            UBUNTU[:-30],
            "a.csv:4: must be CSV, got unexpected end of data: the file may be cut short",
        ),
        ("ubuntu", "a.csv", 'Context,Utterance,Label\n"a,b,1\nc,d,1\n', "a.csv:2: must be CSV, got unexpected end"),
        ("ubuntu", "a.csv", "Context,Utterance,Label\na,b\n", "a.csv:2: must have 3 columns, got 2"),
        ("ubuntu", "a.tsv", UBUNTU_CHAT + "2004", "a.tsv:5: must have a time, a sender, an addressee and a text"),
        ("star", "1.json", '{"Events": [],', ":1: must be JSON, got "),
        ("intents", "a.csv", 'text,category\n"a,b\n', "must be CSV, got unexpected end of data"),
        ("intents", "a.csv", "text,category\na\n", "a.csv:2: must have 2 columns, got 1"),
    ],
)
def test_a_damaged_file_is_an_error_of_one_line(
    tmp_path: Path, format: str, name: str, text: str, message: str
) -> None:
    (tmp_path / name).write_text(text, "utf-8")
    with pytest.raises(DataError, match=re.escape(message)) as error:
        read(str(tmp_path / name), format)
    assert "\n" not in str(error.value)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize("name", sorted({*formats()} - {"chatterbot", "chitchat", "csv"}))
@pytest.mark.parametrize("record", [{}, {"turns": 3, "services": 3, "utterances": 3, "dialog": 3}, {"a": {"log": 3}}])
def test_records_of_another_form_are_skipped_and_counted(tmp_path: Path, name: str, record: dict) -> None:
    (tmp_path / "a.json").write_text(json.dumps(record))
    with pytest.raises(DataError, match=r"a.json: must hold a dialogue, got ") as error:
        read(str(tmp_path / "a.json"), name)
    assert "\n" not in str(error.value)


def test_topics_that_do_not_fit_are_an_error(tmp_path: Path) -> None:
    folder = write(tmp_path, "dailydialog")
    (tmp_path / "dialogues_topic.txt").write_text("1\n")
    with pytest.raises(DataError, match=r"dialogues_topic.txt: must have 2 lines, as dialogues_text.txt has, got 1"):
        read(folder)


def test_domains_in_another_form_are_an_error(tmp_path: Path) -> None:
    folder = write(tmp_path, "clinc")
    (tmp_path / "domains.json").write_text('{"banking": "routing"}')
    with pytest.raises(DataError, match=r"domains.json: must be an object with a list of intents for each domain"):
        read(folder)


def test_options_choose_the_task(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    assert {d.task_id for d in read(write(tmp_path / "m", "metalwoz"), task_key="domain")} == {"BUS"}
    (tmp_path / "c").mkdir()
    assert [d.task_id for d in read(write(tmp_path / "c", "crosswoz"), tasks="domains")] == ["景点+餐馆"]
    with pytest.raises(DataError, match="crosswoz: tasks must be one of types, domains, got towns"):
        read(str(tmp_path / "c"), tasks="towns")
    (tmp_path / "p").mkdir()
    by_id = read(write(tmp_path / "p", "parlai"), task_key="id")
    assert [d.task_id for d in by_id] == ["ann", "bob"]
    assert by_id.skipped == {"without the key id": 2}


def test_an_unknown_option_is_an_error_that_lists_those_of_the_reader(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    with pytest.raises(DataError, match=re.escape("sgd: options of the reader must be among (none), got 'task_key'")):
        read(write(tmp_path / "s", "sgd"), task_key="x")
    with pytest.raises(DataError, match="messages: options of the reader must be among task_key, got 'tsak_key'"):
        read(str(DATA / "topics.jsonl"), tsak_key="x")


def test_options_of_a_config_reach_the_reader(tmp_path: Path) -> None:
    def record(i: int) -> dict[str, object]:
        said = [("user", f"question number {i} of them"), ("assistant", f"the answer number {i} of them")]
        return {"messages": [{"role": who, "content": text} for who, text in said], "who": f"w{i % 6}", "topic": "all"}

    (tmp_path / "mine.jsonl").write_text(lines(*map(record, range(48))))
    (tmp_path / "c.toml").write_text('reader_options = ["task_key=who"]\nmin_dialogues = 2\n')
    by_options = Config.load(tmp_path / "c.toml")
    by_key = Config(task_key="who", min_dialogues=2)
    for config in (by_options, by_key):
        split = load_split(Config.parse({"data": str(tmp_path / "mine.jsonl")}, base=config))
        names = {task.task_id for part in (split.train, split.validation, split.test) for task in part}
        assert names == {f"w{i}" for i in range(6)}
    for options, message in (
        (("who",), "reader_options must be name=value, got 'who'"),
        (("limit=3",), "messages: options of the reader must be among task_key, got 'limit'"),
    ):
        with pytest.raises(UserError, match=message):
            load_split(Config(data=str(tmp_path / "mine.jsonl"), reader_options=options))


def test_help_and_documentation_name_every_format() -> None:
    described = next(key.metadata["help"] for key in fields(Config) if key.name == "format")
    documented = (inspect.getdoc(read) or "").partition("format:")[2].partition("options:")[0]
    page = (Path(__file__).parents[2] / "docs" / "formats.md").read_text("utf-8")
    for name in formats():
        assert re.search(rf"\b{name}\b", described)
        assert f'"{name}"' in documented
        assert f"`{name}`" in page
    assert set(re.findall(r'"(\w+)"', documented)) == {*formats(), "auto"}


def test_a_format_without_marks_is_recognized_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "READERS", dict(READERS))

    @readers.reader("plain", suffixes=(".txt",))
    def plain(path: Path, skipped: object) -> Iterator[Dialogue]:
        yield dialogue("t", "d", enumerate_as_text(readers.text_of(path)))

    def enumerate_as_text(text: str) -> list[tuple[str, str]]:
        return [(str(i), line) for i, line in enumerate(text.splitlines())]

    (tmp_path / "tea.txt").write_text("ann: Tea?\nbob: Yes.\n")
    assert read(str(tmp_path / "tea.txt"))[0].task_id == "t"
    (tmp_path / "train_self_original.txt").write_text(FBDIALOG)
    assert readers._recognize(tmp_path).name == "personachat"


def test_a_file_that_cannot_be_read_does_not_hide_the_others(tmp_path: Path) -> None:
    (tmp_path / "LICENSE.txt").write_bytes(b"\xa9 ann")
    (tmp_path / "a.json").write_text("not JSON")
    with pytest.raises(DataError, match=r"LICENSE.txt:1: must be UTF-8"):
        read(str(tmp_path))
    (tmp_path / "dialogues_001.json").write_text(json.dumps(SGD))
    assert len(read(str(tmp_path))) == 2


def test_rows_are_shown_by_the_name_of_their_dataset() -> None:
    assert (str(Rows([])), str(Rows(Dataset()))) == ("dataset", "banking77")
