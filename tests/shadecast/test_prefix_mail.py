"""What the coordinator passes on between routers: whose, how much, and what is refused."""

import json

import pytest

from shadecast.errors import MessageError
from shadecast.prefix import PrefixIndex
from shadecast.prefix_exchange import Decisions
from shadecast.prefix_mail import Mail, load_columns, others_load, read_news, trust
from shadecast.prompts import read_prompt

KEY = b"k" * 16


def prompt(number, tokens=1000):
    return read_prompt({"prompt": f"{number:08}" * (tokens // 2)}, KEY)


def posted(router_id, *numbers, after=0, load=None, tokens=1000):
    sent, index = Decisions(), PrefixIndex(1_000_000)
    for number in numbers:
        sent.add(index.insert("a", prompt(number, tokens)))
    made = {"router_id": router_id, "after": after, **load_columns(load or {})}
    if numbers:
        made["decisions"] = sent.take()
    return json.loads(json.dumps(made))


def taken(mail, router_id, after=0, now_s=0.0):
    return read_news(json.loads(json.dumps(mail.take(router_id, after, now_s))))


def knows(news, number):
    index = PrefixIndex(1_000_000)
    for decision in news.decisions:
        index.learn(decision)
    return index.match(prompt(number)).get("a", 0) > 900


def test_what_one_router_posts_the_others_take_once():
    mail = Mail()
    assert mail.post(posted("one", 1), 0.0) == ("one", 0)
    news = taken(mail, "two")
    assert knows(news, 1)
    assert not knows(news, 2)
    assert taken(mail, "two", news.number).decisions == []
    assert taken(mail, "one").decisions == [], "its own are not news"
    mail.post(posted("one", 2), 0.1)
    later = taken(mail, "two", news.number)
    assert knows(later, 2)
    assert not knows(later, 1)


def test_a_router_that_comes_late_has_the_last_seconds_only():
    mail = Mail()
    mail.post(posted("one", 1), 0.0)
    mail.post(posted("one", 2), 9.0)
    assert knows(taken(mail, "two", now_s=9.0), 1)
    mail.post(posted("one", 3), 10.5)
    news = taken(mail, "two", now_s=10.5)
    assert [knows(news, number) for number in (1, 2, 3)] == [False, True, True]


def test_after_a_restart_of_the_coordinator_numbers_begin_anew_and_nothing_is_missed():
    mail = Mail()
    mail.post(posted("one", 1), 0.0)
    assert knows(taken(mail, "two", after=5000), 1)


def test_no_more_is_kept_and_sent_than_fits():
    mail = Mail()
    for number in range(200):
        mail.post(posted("one", *range(100 * number, 100 * number + 20), tokens=12_000), 0.0)
    sizes, number, rounds = [], 0, 0
    while True:
        made = mail.take("two", number, 0.0)
        if not made["decisions"]:
            break
        sizes.append(len(json.dumps(made)))
        assert made["number"] > number
        number, rounds = made["number"], rounds + 1
    assert max(sizes) < 700_000
    assert sum(sizes) < 6_000_000
    assert rounds > 4


def test_loads_are_the_sum_of_the_others_with_their_age():
    mail = Mail()
    mail.post(posted("one", load={"a": 100.0, "b": 300.0}), 10.0)
    mail.post(posted("two", load={"a": 100.0}), 11.0)
    news = taken(mail, "three", now_s=11.0)
    assert news.tokens == {"a": 200.0, "b": 300.0}
    assert news.age_s == pytest.approx(0.8)
    assert taken(mail, "one", now_s=11.0).tokens == {"a": 100.0}
    mail.post(posted("one", load={}), 12.0)
    assert taken(mail, "three", now_s=12.0).tokens == {"a": 100.0}, "the newest word counts"
    assert taken(mail, "three", now_s=17.0).tokens == {}, "a router that is gone has nothing"


def test_what_is_old_differs_less_from_the_mean():
    told = {"a": 900.0, "b": 0.0}
    fresh, old = (others_load(told, age_s, ["a", "b", "c"]) for age_s in (0.0, 10.0))
    assert fresh == pytest.approx({"a": 300 + 600 * trust(0.0), "b": 300 - 300 * 0.7, "c": 90.0})
    assert old == pytest.approx(dict.fromkeys("abc", 300.0), rel=0.01)
    assert trust(2.0) < trust(1.0) == pytest.approx(trust(0.0) / 2.0)
    assert others_load(told, 0.0, []) == {}


@pytest.mark.parametrize(
    "change",
    [
        {"router_id": None},
        {"router_id": ""},
        {"after": "x"},
        {"after": None},
        {"decisions": []},
        {"decisions": {"replicas": ["a"]}},
        {"load_of": 5},
        {"load_of": [1], "tokens": [1]},
        {"load_of": ["a"], "tokens": [1, 2]},
        {"load_of": ["a"], "tokens": [-1]},
        {"load_of": ["a"], "tokens": [float("nan")]},
        {"load_of": ["a"], "tokens": [True]},
        {"load_of": ["a"], "tokens": ["1"]},
        {"load_of": [str(i) for i in range(20_000)], "tokens": [1] * 20_000},
    ],
)
def test_what_cannot_be_read_is_refused_and_nothing_of_it_kept(change):
    mail = Mail()
    with pytest.raises(MessageError):
        mail.post({**posted("one", 1, load={"a": 5.0}), **change}, 0.0)
    news = taken(mail, "two")
    assert (news.decisions, news.tokens) == ([], {})


@pytest.mark.parametrize(
    "received", [None, 7, [], {"number": "x"}, {"decisions": 5}, {"decisions": [5]}, {"tokens": [1]}]
)
def test_news_that_are_none_are_refused(received):
    with pytest.raises(MessageError):
        read_news(received)
