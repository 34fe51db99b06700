"""The embedded demo corpus: speech, text, translations and labels made in under a minute.

No paper section: this file only stands in for LibriSpeech, CoVoST 2, GLUE and Google's text
normalisation set when nothing has been downloaded. It writes *their* folder and column layouts, so
that everything downstream runs the loaders it would run on the real corpora.

  1. a small grammar, written for this project, draws English sentences with German translations
     (agreement, numbers, dates, prices, sentiment, negation); its lexicon has a few hundred words;
  2. rules derive sentiment, inference and paraphrase labels, and written forms ("$40") of spoken
     numbers ("forty dollars");
  3. espeak-ng speaks some of them in 24 voices, 8 of which are kept out of training.

espeak-ng is GPL-3 software: it is not part of this project, and is only loaded at run time, in
worker processes of their own, from the separately installed package espeakng-loader.

Everything is a function of (version, seed, scale). A held-out sentence is in no training file.

Public: make_demo, VoiceError.   CLI: python demo.py [--root demo_data] [--seed 0]
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

VERSION = 1  # raise it when the same seed would give other files: old copies are then remade
VOICE_PACKAGE = "espeakng-loader==0.2.4"
SAMPLE_RATE = 16000
NOISE_DBFS = -60.0  # noise floor, so that the log of a silent mel band stays in a natural range
MIN_AUDIO_S = 1.5


class VoiceError(ValueError):
    """The speech synthesis library is missing or does not work."""


# ------------------------------------------------------------------------------------------------
# Lexicon. One line each; German nouns come with gender (m, f, n), singular and plural.


class Noun(NamedTuple):
    en: str
    en_plural: str
    gender: str
    de: str
    de_plural: str
    category: str = ""


class Verb(NamedTuple):
    base: str
    third: str  # he buys
    past: str
    de_singular: str
    de_plural: str
    participle: str


def _rows(table: str) -> list[list[str]]:
    """Rows stand on lines of their own or between semicolons; their cells between slashes."""
    return [[cell.strip() for cell in row.split("/")] for row in re.split(r"[;\n]+\s*", table.strip())]


PEOPLE = [Noun(*row) for row in _rows("""
    teacher/teachers/m/Lehrer/Lehrer; doctor/doctors/m/Arzt/Ärzte; farmer/farmers/m/Bauer/Bauern;
    baker/bakers/m/Bäcker/Bäcker; sister/sisters/f/Schwester/Schwestern;
    brother/brothers/m/Bruder/Brüder; girl/girls/n/Mädchen/Mädchen; boy/boys/m/Junge/Jungen;
    woman/women/f/Frau/Frauen; man/men/m/Mann/Männer; neighbor/neighbors/m/Nachbar/Nachbarn;
    student/students/m/Student/Studenten; singer/singers/m/Sänger/Sänger; cook/cooks/m/Koch/Köche;
    driver/drivers/m/Fahrer/Fahrer; child/children/n/Kind/Kinder; aunt/aunts/f/Tante/Tanten;
    uncle/uncles/m/Onkel/Onkel; painter/painters/m/Maler/Maler; captain/captains/m/Kapitän/Kapitäne;
    grandmother/grandmothers/f/Großmutter/Großmütter;
    grandfather/grandfathers/m/Großvater/Großväter; daughter/daughters/f/Tochter/Töchter;
    queen/queens/f/Königin/Königinnen""")]
OBJECTS = [Noun(*row) for row in _rows("""
    apple/apples/m/Apfel/Äpfel/fruit; pear/pears/f/Birne/Birnen/fruit;
    lemon/lemons/f/Zitrone/Zitronen/fruit; banana/bananas/f/Banane/Bananen/fruit;
    carrot/carrots/f/Karotte/Karotten/vegetable; potato/potatoes/f/Kartoffel/Kartoffeln/vegetable;
    onion/onions/f/Zwiebel/Zwiebeln/vegetable; horse/horses/n/Pferd/Pferde/animal;
    cow/cows/f/Kuh/Kühe/animal; dog/dogs/m/Hund/Hunde/animal; cat/cats/f/Katze/Katzen/animal;
    bird/birds/m/Vogel/Vögel/animal; coat/coats/m/Mantel/Mäntel/garment;
    shirt/shirts/n/Hemd/Hemden/garment; hat/hats/m/Hut/Hüte/garment;
    skirt/skirts/m/Rock/Röcke/garment; bottle/bottles/f/Flasche/Flaschen/container;
    basket/baskets/m/Korb/Körbe/container; bag/bags/f/Tasche/Taschen/container;
    car/cars/n/Auto/Autos/vehicle; boat/boats/n/Boot/Boote/vehicle;
    bicycle/bicycles/n/Fahrrad/Fahrräder/vehicle; guitar/guitars/f/Gitarre/Gitarren/instrument;
    piano/pianos/n/Klavier/Klaviere/instrument; violin/violins/f/Geige/Geigen/instrument""")]
CATEGORIES = {row[0]: Noun(*row) for row in _rows("""
    fruit/fruits/f/Frucht/Früchte; vegetable/vegetables/n/Gemüse/Gemüse;
    animal/animals/n/Tier/Tiere; garment/garments/n/Kleidungsstück/Kleidungsstücke;
    container/containers/m/Behälter/Behälter; vehicle/vehicles/n/Fahrzeug/Fahrzeuge;
    instrument/instruments/n/Instrument/Instrumente""")}
PLACES_WITH_SIZE = [Noun(*row) for row in _rows("""
    river/rivers/m/Fluss/Flüsse; bridge/bridges/f/Brücke/Brücken; wall/walls/f/Mauer/Mauern;
    street/streets/f/Straße/Straßen; tunnel/tunnels/m/Tunnel/Tunnel; tower/towers/m/Turm/Türme;
    canal/canals/m/Kanal/Kanäle; gate/gates/n/Tor/Tore""")]
WORKS = [Noun(*row) for row in _rows("""
    film/films/m/Film/Filme; book/books/n/Buch/Bücher; song/songs/n/Lied/Lieder;
    concert/concerts/n/Konzert/Konzerte; meal/meals/n/Essen/Essen;
    story/stories/f/Geschichte/Geschichten; soup/soups/f/Suppe/Suppen; novel/novels/m/Roman/Romane""")]
VEHICLES = [Noun(*row) for row in _rows("""
    train/trains/m/Zug/Züge; bus/buses/m/Bus/Busse; ship/ships/n/Schiff/Schiffe""")]

VERBS = [Verb(*row) for row in _rows("""
    buy/buys/bought/kauft/kaufen/gekauft; sell/sells/sold/verkauft/verkaufen/verkauft;
    see/sees/saw/sieht/sehen/gesehen; find/finds/found/findet/finden/gefunden;
    carry/carries/carried/trägt/tragen/getragen; paint/paints/painted/malt/malen/gemalt;
    need/needs/needed/braucht/brauchen/gebraucht; wash/washes/washed/wäscht/waschen/gewaschen;
    lose/loses/lost/verliert/verlieren/verloren; choose/chooses/chose/wählt/wählen/gewählt;
    draw/draws/drew/zeichnet/zeichnen/gezeichnet;
    admire/admires/admired/bewundert/bewundern/bewundert;
    forget/forgets/forgot/vergisst/vergessen/vergessen;
    hide/hides/hid/versteckt/verstecken/versteckt""")]
MOVES = _rows("arrived/angekommen; returned/zurückgekommen; left/abgereist; disappeared/verschwunden")
# Adjectives: English / German stem.
QUALITIES = _rows("""
    red/rot; green/grün; blue/blau; yellow/gelb; white/weiß; black/schwarz; small/klein; big/groß;
    old/alt; new/neu; heavy/schwer; cheap/billig; beautiful/schön; strange/seltsam""")
TRAITS = _rows("old/alt; young/jung; tall/groß; poor/arm; rich/reich; friendly/freundlich; tired/müde")
GOOD = _rows("""
    wonderful/wunderbar; funny/lustig; exciting/spannend; brilliant/brillant; clever/klug;
    excellent/ausgezeichnet; charming/bezaubernd; perfect/perfekt; fresh/frisch""")
BAD = _rows("""
    boring/langweilig; terrible/schrecklich; stupid/dumm; awful/furchtbar; weak/schwach;
    ugly/hässlich; bad/schlecht; empty/leer; cold/kalt""")
DEGREES = _rows("very/sehr; really/wirklich; rather/ziemlich; simply/einfach")
LIKED = _rows("loved/geliebt; praised/gelobt; enjoyed/genossen; recommended/empfohlen")
DISLIKED = _rows("hated/gehasst; criticized/kritisiert; regretted/bereut; mocked/verspottet")
# English comparative / its opposite / German comparative.
COMPARATIVES = _rows("""
    older/younger/älter; younger/older/jünger; taller/shorter/größer; shorter/taller/kleiner;
    faster/slower/schneller; slower/faster/langsamer; richer/poorer/reicher; poorer/richer/ärmer""")
SIZES = _rows("long/lang; wide/breit; high/hoch")
PLACES = _rows("""
    in the market/auf dem Markt; in the garden/im Garten; at the station/am Bahnhof;
    in the village/im Dorf; in the kitchen/in der Küche; near the river/am Fluss;
    behind the church/hinter der Kirche; in front of the school/vor der Schule;
    under the bridge/unter der Brücke; in the city/in der Stadt; on the island/auf der Insel;
    in the library/in der Bibliothek; in the forest/im Wald; at the harbor/am Hafen;
    next to the theater/neben dem Theater; on the mountain/auf dem Berg""")
DAYS = _rows("""
    Monday/Montag; Tuesday/Dienstag; Wednesday/Mittwoch; Thursday/Donnerstag; Friday/Freitag;
    Saturday/Samstag; Sunday/Sonntag""")
MONTHS = _rows("""
    January/Januar; February/Februar; March/März; April/April; May/Mai; June/Juni; July/Juli;
    August/August; September/September; October/Oktober; November/November; December/Dezember""")
# English / German / tenses that go with it.
TIMES = [[f"on {en}", f"am {de}", "any"] for en, de in DAYS]
TIMES += [[f"in {en}", f"im {de}", "any"] for en, de in MONTHS]
TIMES += _rows("""
    yesterday/gestern/past; last week/letzte Woche/past; last year/letztes Jahr/past;
    every day/jeden Tag/present; every morning/jeden Morgen/present; today/heute/any;
    in the evening/am Abend/any; at night/in der Nacht/any""")
CITIES = _rows("""
    Berlin/Berlin; Paris/Paris; London/London; Rome/Rom; Vienna/Wien; Madrid/Madrid; Prague/Prag;
    Boston/Boston""")
ACRONYMS = ["BBC", "FBI", "USA", "EU", "UN", "IBM", "MIT", "NHL"]

# Determiner -> gender or p(lural) -> German (article, adjective ending).
GERMAN_DETERMINERS = {
    "the": {"m": ("der", "e"), "f": ("die", "e"), "n": ("das", "e"), "p": ("die", "en")},
    "a": {"m": ("ein", "er"), "f": ("eine", "e"), "n": ("ein", "es"), "p": ("", "e")},
    "every": {"m": ("jeder", "e"), "f": ("jede", "e"), "n": ("jedes", "e")},
    "the+": {"m": ("den", "en"), "f": ("die", "e"), "n": ("das", "e"), "p": ("die", "en")},
    "a+": {"m": ("einen", "en"), "f": ("eine", "e"), "n": ("ein", "es"), "p": ("", "e")},
    "no+": {"m": ("keinen", "en"), "f": ("keine", "e"), "n": ("kein", "es"), "p": ("keine", "en")},
}


def noun_de(noun: Noun, determiner: str, stem: str = "", plural: bool = False) -> str:
    """German noun phrase with the right article and adjective ending: 'einen roten Apfel'."""
    article, ending = GERMAN_DETERMINERS[determiner]["p" if plural else noun.gender]
    adjective = stem + ending[stem.endswith("e") :] if stem else ""
    return _join(article, adjective, noun.de_plural if plural else noun.de)


def noun_en(noun: Noun, determiner: str, adjective: str = "", plural: bool = False) -> str:
    """English noun phrase; the indefinite article becomes 'an' before a vowel."""
    words = _join(adjective, noun.en_plural if plural else noun.en)
    if determiner == "a":
        determiner = "" if plural else ("an" if words[0] in "aeiou" else "a")
    return _join(determiner, words)


def _join(*parts: str) -> str:
    return " ".join(part for part in parts if part)


# ------------------------------------------------------------------------------------------------
# Numbers. In a sentence, every one stands as [CLASS|written|spoken], so that one string holds the
# spoken sentence (speech, plain text) and the written one (text normalisation).

ONES = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen
    fifteen sixteen seventeen eighteen nineteen""".split()
TENS = "_ _ twenty thirty forty fifty sixty seventy eighty ninety".split()
EINER = """null ein zwei drei vier fünf sechs sieben acht neun zehn elf zwölf dreizehn vierzehn
    fünfzehn sechzehn siebzehn achtzehn neunzehn""".split()
ZEHNER = "_ _ zwanzig dreißig vierzig fünfzig sechzig siebzig achtzig neunzig".split()
ORDINALS = {"one": "first", "two": "second", "three": "third", "five": "fifth", "eight": "eighth",
            "nine": "ninth", "twelve": "twelfth"}
NUMBER = re.compile(r"\[([A-Z]+)\|([^|\]]*)\|([^\]]*)\]")


def english_number(n: int) -> str:
    """0 <= n <= 9999 in words, as said in the United States: 'one hundred five'."""
    if n < 20:
        return ONES[n]
    if n < 100:
        return _join(TENS[n // 10], ONES[n % 10] if n % 10 else "")
    unit, name = (1000, "thousand") if n >= 1000 else (100, "hundred")
    return _join(ONES[n // unit], name, english_number(n % unit) if n % unit else "")


def german_number(n: int) -> str:
    """0 <= n <= 9999 in one German word: 'dreiundzwanzig'."""
    if n < 100:
        if n == 1:
            return "eins"
        if n < 20:
            return EINER[n]
        return (EINER[n % 10] + "und" if n % 10 else "") + ZEHNER[n // 10]
    unit, name = (1000, "tausend") if n >= 1000 else (100, "hundert")
    return EINER[n // unit] + name + (german_number(n % unit) if n % unit else "")


def english_ordinal(n: int) -> str:
    *head, last = english_number(n).split()
    return _join(*head, ORDINALS.get(last) or (last[:-1] + "ie" if last[-1] == "y" else last) + "th")


def german_ordinal(n: int) -> str:
    """In the form after 'am' and 'im': 'am dritten Mai'."""
    irregular = {1: "ersten", 3: "dritten", 7: "siebten", 8: "achten"}
    return irregular.get(n) or german_number(n) + ("ten" if n < 20 else "sten")


def spoken(sentence: str) -> str:
    """'It costs [MONEY|$5|five dollars].' -> 'It costs five dollars.'"""
    return NUMBER.sub(r"\3", sentence)


def written_tokens(sentence: str) -> list[tuple[str, str, str]]:
    """(class, before, after) of each token, in the convention of Google's text normalisation set:
    after is '<self>' for a plain word and 'sil' for punctuation."""
    tokens = []
    for match in re.finditer(NUMBER.pattern + r"|([\w']+)|([.,?!])", sentence):
        kind, before, after, word, mark = match.groups()
        if kind:
            tokens.append((kind, before, after.lower()))
        else:
            tokens.append(("PLAIN", word, "<self>") if word else ("PUNCT", mark, "sil"))
    return tokens


def words_of(sentence: str) -> list[str]:
    """The spoken words in lower case: letters and apostrophes only."""
    return re.findall(r"[a-z']+", spoken(sentence).lower())


# ------------------------------------------------------------------------------------------------
# Grammar


class Sentence(NamedTuple):
    en: str  # may hold numbers as [CLASS|written|spoken]
    de: str
    positive: bool | None = None  # sentiment, where there is one


def _sentence(en: str, de: str, positive: bool | None = None) -> Sentence:
    en, de = (text if text[-1] in "?!" else text + "." for text in (en, de))
    return Sentence(en[0].upper() + en[1:], de[0].upper() + de[1:], positive)


@dataclass(frozen=True)
class Event:
    """Somebody does something to something, somewhere, some time."""

    person: Noun
    verb: Verb
    thing: Noun
    trait: tuple = ("", "")  # of the person: (English, German stem)
    quality: tuple = ("", "")  # of the thing
    many_people: bool = False
    past: bool = True
    negated: bool = False
    short: bool = False  # "didn't" instead of "did not"
    count: int = 0  # number of things; 0 = "a(n)"
    at_least: str = ""  # "more than" or "fewer than" before the count
    place: tuple = ("", "")
    time: tuple = ("", "")
    time_first: bool = False

    def subject(self) -> str:
        return noun_en(self.person, "the", self.trait[0], self.many_people)

    def object(self) -> str:
        if not self.count:
            return noun_en(self.thing, "a", self.quality[0])
        number = f"[CARDINAL|{self.count}|{english_number(self.count)}]"
        return _join(self.at_least, number, noun_en(self.thing, "", self.quality[0], True))

    def do(self) -> str:
        """The auxiliary of questions and negations."""
        return "did" if self.past else "do" if self.many_people else "does"

    def finite(self) -> str:
        if self.negated:
            return _join(self.do() + ("n't" if self.short else " not"), self.verb.base)
        present = self.verb.base if self.many_people else self.verb.third
        return self.verb.past if self.past else present

    def sentence(self) -> Sentence:
        middle = (self.subject(), self.finite(), self.object(), self.place[0])
        order = (self.time[0], *middle) if self.time_first else (*middle, self.time[0])
        return _sentence(_join(*order), self.german())

    def german(self, ask: str = "") -> str:
        """German rendering; with `ask` (wer, was, wo, wann, wie viele) the question for it."""
        thing = noun_de(self.thing, "no+" if self.negated else "a+", self.quality[1], self.count > 0)
        if self.count:
            thing = german_number(self.count) + " " + thing
        subject = noun_de(self.person, "the", self.trait[1], self.many_people)
        many = self.many_people and ask != "wer"
        finite = ("haben" if many else "hat") if self.past else self.verb[4 if many else 3]
        closing = self.verb.participle if self.past else ""
        place, time = self.place[1], self.time[1]
        if ask == "wie viele":
            ask, thing = _join(ask, noun_de(self.thing, "a+", self.quality[1], True)), ""
        subject, thing = "" if ask == "wer" else subject, "" if ask == "was" else thing
        place, time = "" if ask == "wo" else place, "" if ask == "wann" else time
        if ask:
            return _join(ask, finite, subject, time, thing, place, closing) + "?"
        if self.time_first and time:
            return _join(time, finite, subject, thing, place, closing)
        return _join(subject, finite, time, thing, place, closing)

    def questions(self) -> list[str]:
        """The German question words that this event has an answer to."""
        asks = ["wer", "wie viele"] if self.count else ["wer", "was"]
        return asks + ["wo"] * bool(self.place[0]) + ["wann"] * bool(self.time[0])

    def question(self, ask: str, style: int = 0) -> Sentence:
        """The question for one part; style 1 is a paraphrase with the same meaning, 2 another."""
        words = {"wer": ("who", "which person"), "was": ("what", "which thing"),
                 "wo": ("where", "in which place"), "wann": ("when", "at which time"),
                 "wie viele": ("how many", "what number of")}[ask]
        word = words[style == 1]
        place, time = "" if ask == "wo" else self.place[0], "" if ask == "wann" else self.time[0]
        if ask == "wie viele":
            word = _join(word, noun_en(self.thing, "", self.quality[0], True))
        thing = self.object() if ask in ("wer", "wo", "wann") else ""
        if ask == "wer":
            text = _join(word, replace(self, many_people=False).finite(), thing, place, time)
        elif style == 2:
            text = _join(word, self.subject(), self.finite(), thing, place, time)
        else:
            text = _join(word, self.do(), self.subject(), self.verb.base, thing, place, time)
        text = ("do you know " if style == 2 else "") + text + "?"
        return _sentence(text, self.german(ask)[0].upper() + self.german(ask)[1:])


class Grammar:
    """Draws sentences. `person` and `thing`, when set, come up often: a document's topic."""

    def __init__(self, rng: np.random.Generator):
        self.rng = rng
        self.topic: dict[str, Noun] = {}

    def one(self, items):
        return items[int(self.rng.integers(len(items)))]

    def chance(self, p: float) -> bool:
        return bool(self.rng.random() < p)

    def between(self, low: int, high: int) -> int:
        """low <= n <= high, without ..01, whose German form inflects."""
        n = int(self.rng.integers(low, high + 1))
        return n + (n % 100 == 1)

    def new_topic(self):
        self.topic = {"person": self.one(PEOPLE), "thing": self.one(OBJECTS)}

    def person(self) -> Noun:
        return self.topic["person"] if self.topic and self.chance(0.6) else self.one(PEOPLE)

    def thing(self) -> Noun:
        return self.topic["thing"] if self.topic and self.chance(0.4) else self.one(OBJECTS)

    def count(self) -> int:
        return self.between(*self.one([(2, 12), (2, 99), (2, 99), (100, 999), (1000, 9999)]))

    def time(self, past: bool):
        fits = ("any", "past" if past else "present")
        return self.one([row for row in TIMES if row[2] in fits])[:2]

    def random_event(self) -> Event:
        past, negated = self.chance(0.6), self.chance(0.2)
        none = ("", "")
        return Event(
            self.person(), self.one(VERBS), self.thing(), past=past, negated=negated,
            trait=self.one(TRAITS) if self.chance(0.3) else none,
            quality=self.one(QUALITIES) if self.chance(0.6) else none,
            many_people=self.chance(0.3), short=self.chance(0.4),
            count=self.count() if not negated and self.chance(0.3) else 0,
            place=self.one(PLACES) if self.chance(0.7) else none,
            time=self.time(past) if self.chance(0.6) else none,
            time_first=self.chance(0.25),
        )

    def event(self) -> Sentence:
        return self.random_event().sentence()

    def question(self) -> Sentence:
        event = replace(self.random_event(), negated=False)
        return event.question(self.one(event.questions()))

    def opinion(self) -> Sentence:
        """A sentiment statement; negation and 'but' turn the polarity."""
        work, person, good = self.one(WORKS), self.person(), self.chance(0.5)
        same, other = (GOOD, BAD) if good else (BAD, GOOD)
        (a, a_de), (b, b_de), (c, c_de) = self.one(same), self.one(same), self.one(other)
        degree, degree_de = self.one(DEGREES)
        when, when_de = self.one(TIMES[:7])[:2]
        verb, participle = self.one(LIKED if good else DISLIKED)
        liked_not, liked_not_de = self.one(DISLIKED if good else LIKED)
        who, who_de = noun_en(person, "the"), noun_de(person, "the")
        what, what_de = noun_en(work, "the"), noun_de(work, "the")
        whom_de, it = noun_de(work, "the+"), {"m": "er", "f": "sie", "n": "es"}[work.gender]
        forms = [
            (f"{what} {when} was {degree} {a}", f"{what_de} {when_de} war {degree_de} {a_de}"),
            (f"{what} was {a} and {degree} {b}", f"{what_de} war {a_de} und {degree_de} {b_de}"),
            (f"{what} {when} was not {c}", f"{what_de} {when_de} war nicht {c_de}"),
            (f"{what} was {a} and not {c}", f"{what_de} war {a_de} und nicht {c_de}"),
            (f"{who} {verb} {what} {when}", f"{who_de} hat {whom_de} {when_de} {participle}"),
            (f"{who} never {liked_not} {what}", f"{who_de} hat {whom_de} nie {liked_not_de}"),
            (f"what {noun_en(work, 'a', a)} this was!", f"was war das für {noun_de(work, 'a', a_de)}!"),
            (f"{what} was {c} at first, but {degree} {a} later",
             f"{what_de} war zuerst {c_de}, aber später war {it} {degree_de} {a_de}"),
            (f"{who} thinks that {what} was {degree} {a}",
             f"{who_de} denkt, dass {what_de} {degree_de} {a_de} war"),
        ]
        return _sentence(*self.one(forms), good)

    def price(self) -> Sentence:
        thing, plural, (quality, stem) = self.thing(), self.chance(0.4), self.one(QUALITIES)
        dollars, cents = self.count(), self.between(2, 19) * 5
        money = f"[MONEY|${dollars}|{english_number(dollars)} dollars]"
        geld = f"{german_number(dollars)} Dollar"
        if dollars < 100 and self.chance(0.4):
            said = f"{english_number(dollars)} dollars and {english_number(cents)} cents"
            money = f"[MONEY|${dollars}.{cents:02d}|{said}]"
            geld += f" und {german_number(cents)} Cent"
        costs, kosten = ("cost", "kosten") if plural else ("costs", "kostet")
        return _sentence(f"{noun_en(thing, 'the', quality, plural)} {costs} {money}",
                         f"{noun_de(thing, 'the', stem, plural)} {kosten} {geld}")

    def date(self) -> Sentence:
        person, day, (month, monat) = self.person(), int(self.rng.integers(1, 29)), self.one(MONTHS)
        many, (move, participle) = self.chance(0.3), self.one(MOVES)
        place = self.one(CITIES) if move in ("arrived", "returned") and self.chance(0.4) else None
        where = ("", "") if not place else (
            f"{'in' if move == 'arrived' else 'from'} {place[0]}",
            f"{'in' if move == 'arrived' else 'aus'} {place[1]}")
        if self.chance(0.5):
            said = f"[DATE|{month} {day}|{month} {english_ordinal(day)}]"
        else:
            said = f"[DATE|{day} {month}|the {english_ordinal(day)} of {month}]"
        helper = "sind" if many else "ist"
        return _sentence(
            _join(noun_en(person, "the", "", many), move, where[0], "on", said),
            _join(noun_de(person, "the", "", many), helper, f"am {german_ordinal(day)} {monat}",
                  where[1], participle))

    def year(self) -> Sentence:
        place, (quality, stem) = self.one(PLACES_WITH_SIZE), self.one(QUALITIES)
        year = 100 * int(self.rng.integers(17, 20)) + self.between(10, 99)
        said = f"{english_number(year // 100)} {english_number(year % 100)}"
        jahr = f"{german_number(year // 100)}hundert{german_number(year % 100)}"
        return _sentence(
            f"{noun_en(place, 'the', quality)} was built in [DATE|{year}|{said}]",
            f"{noun_de(place, 'the', stem)} wurde im Jahr {jahr} gebaut")

    def departure(self) -> Sentence:
        vehicle, (city, stadt), (day, tag) = self.one(VEHICLES), self.one(CITIES), self.one(DAYS)
        hour, minute = self.between(2, 12), 5 * int(self.rng.integers(12))
        said = "o'clock" if minute == 0 else _join("oh" * (minute < 10), english_number(minute))
        uhr = _join(german_number(hour), "Uhr", german_number(minute) if minute else "")
        clock = f"[TIME|{hour}:{minute:02d}|{english_number(hour)} {said}]"
        on, am = (f" on {day}", f" am {tag}") if self.chance(0.6) else ("", "")
        if self.chance(0.5):
            return _sentence(f"{noun_en(vehicle, 'the')} to {city} leaves at {clock}{on}",
                             f"{noun_de(vehicle, 'the')} nach {stadt} fährt{am} um {uhr} ab")
        return _sentence(f"{noun_en(vehicle, 'the')} from {city} arrives at {clock}{on}",
                         f"{noun_de(vehicle, 'the')} aus {stadt} kommt{am} um {uhr} an")

    def measure(self) -> Sentence:
        place, (size, gross) = self.one(PLACES_WITH_SIZE), self.one(SIZES)
        n, (unit, short, einheit) = self.count(), self.one(UNITS[: 1 + (size == "long")])
        return _sentence(
            f"{noun_en(place, 'the')} is [MEASURE|{n} {short}|{english_number(n)} {unit}] {size}",
            f"{noun_de(place, 'the')} ist {german_number(n)} {einheit} {gross}")

    def weight(self) -> Sentence:
        thing, (quality, stem) = self.thing(), self.one(QUALITIES)
        whole, tenth = self.between(2, 40), int(self.rng.integers(1, 10))
        said = f"{english_number(whole)} point {ONES[tenth]} kilograms"
        return _sentence(
            f"{noun_en(thing, 'the', quality)} weighs [MEASURE|{whole}.{tenth} kg|{said}]",
            f"{noun_de(thing, 'the', stem)} wiegt {german_number(whole)} Komma "
            f"{german_number(tenth)} Kilogramm")

    def percent(self) -> Sentence:
        n, (when, wann) = self.between(2, 99), self.one(TIMES[:19])[:2]
        grew, wuchs = self.one([("rose", "gestiegen"), ("fell", "gefallen")])
        return _sentence(
            f"{when} the price {grew} by [MEASURE|{n}%|{english_number(n)} percent]",
            f"{wann} ist der Preis um {german_number(n)} Prozent {wuchs}")

    def result(self) -> Sentence:
        (when, wann), whole, a, b = self.one(TIMES[:19])[:2], *self.rng.integers(1, 10, 3).tolist()
        return _sentence(
            f"{when} the result was [DECIMAL|{whole}.{a}{b}|{ONES[whole]} point {ONES[a]} {ONES[b]}]",
            f"{wann} war das Ergebnis {german_number(whole)} Komma {german_number(a)} "
            f"{german_number(b)}")

    def floor(self) -> Sentence:
        person, n, (trait, stem) = self.person(), self.between(2, 40), self.one(TRAITS)
        ending = {1: "st", 2: "nd", 3: "rd"}.get(0 if 10 < n < 20 else n % 10, "th")
        many = self.chance(0.3)
        return _sentence(
            f"{noun_en(person, 'the', trait, many)} {'live' if many else 'lives'} on the "
            f"[ORDINAL|{n}{ending}|{english_ordinal(n)}] floor",
            f"{noun_de(person, 'the', stem, many)} {'wohnen' if many else 'wohnt'} im "
            f"{german_ordinal(n)} Stock")

    def comparison(self) -> Sentence:
        a, b, (more, _, mehr) = self.person(), self.one(PEOPLE), self.one(COMPARATIVES)
        (trait, stem) = self.one(TRAITS)
        if a == b:
            return self.comparison()
        return _sentence(
            f"{noun_en(a, 'the')} is {more} than {noun_en(b, 'the', trait)}",
            f"{noun_de(a, 'the')} ist {mehr} als {noun_de(b, 'the', stem)}")

    def fact(self) -> Sentence:
        person, thing = self.person(), self.thing()
        kind = CATEGORIES[thing.category]
        return _sentence(
            f"{noun_en(person, 'the')} knows that every {thing.en} is {noun_en(kind, 'a')}",
            f"{noun_de(person, 'the')} weiß, dass {noun_de(thing, 'every')} {noun_de(kind, 'a')} ist",
        )

    def letters(self) -> Sentence:
        """Only for text normalisation: nobody writes 'b b c' in running text."""
        name, day, n = self.one(ACRONYMS), self.one(DAYS)[0], self.rng.integers(0, 10, 7).tolist()
        digits = "".join(map(str, n))
        call = f"[TELEPHONE|{digits[:3]}-{digits[3:]}|{_telephone(digits)}]"
        said = f"[LETTERS|{name}|{' '.join(name.lower())}]"
        return _sentence(self.one([
            f"{noun_en(self.person(), 'the')} called the {said} on {day}",
            f"{noun_en(self.person(), 'the')} works for the {said}",
            f"please call {call} on {day}"]), "-")

    def sentence(self, weights: dict[str, float] | None = None) -> Sentence:
        """One sentence of 4 to 14 words; weights: name of a method above -> relative frequency."""
        weights = weights or MIXTURE
        kinds, share = list(weights), np.cumsum(list(weights.values()))
        while True:
            kind = kinds[int(np.searchsorted(share, self.rng.random() * share[-1], "right"))]
            sentence = getattr(self, kind)()
            if 4 <= len(words_of(sentence.en)) <= 14:
                return sentence


def _telephone(digits: str) -> str:
    said = ["o" if d == "0" else ONES[int(d)] for d in digits]
    return " ".join(said[:3]) + " sil " + " ".join(said[3:])


UNITS = _rows("meters/m/Meter; kilometers/km/Kilometer")
MIXTURE = {"event": 34, "question": 8, "opinion": 17, "price": 6, "date": 6, "year": 4, "departure": 6,
           "measure": 4, "weight": 3, "percent": 2, "result": 1, "floor": 3, "comparison": 4,
           "fact": 2}
NUMBERS_MIXTURE = {"event": 25, "price": 12, "date": 12, "year": 8, "departure": 10, "measure": 7,
                   "weight": 6, "percent": 5, "result": 6, "floor": 7, "letters": 8}


# ------------------------------------------------------------------------------------------------
# GLUE: pairs of sentences with labels that follow from rules

Texts = tuple[str, ...]
NOTHING = ("", "")


def _other(grammar: Grammar, event: Event, parts: list[str]) -> Event:
    """The event with one of `parts` (person, thing, verb) replaced by a really different one."""
    part = grammar.one(parts)
    old = getattr(event, part)
    pool = {"person": PEOPLE, "thing": OBJECTS, "verb": VERBS}[part]
    kind = getattr(old, "category", "") or None  # not 'an apple' for 'a fruit'
    return replace(event, **{part: grammar.one(
        [new for new in pool if new != old and getattr(new, "category", "") != kind])})


def _weaker(grammar: Grammar, event: Event, keep: Texts = ()) -> Event:
    """An event that must have happened if the given one did: details left out, a fruit for an
    apple, 'more than ten' for twenty."""
    changes = [{part: NOTHING} for part in ("trait", "quality", "place", "time")
               if getattr(event, part)[0] and part not in keep]
    changes.append({"thing": CATEGORIES[event.thing.category]})
    if event.count > 3:
        changes.append({"count": grammar.between(2, event.count - 2), "at_least": "more than"})
    for index in grammar.rng.permutation(len(changes))[: 1 + grammar.chance(0.4)]:
        event = replace(event, **changes[int(index)])
    return event


def event_inference(grammar: Grammar, label: str, diary: bool = False) -> tuple[str, str]:
    """MNLI pair about an event. Under negation entailment runs the other way: who did not buy a
    fruit did not buy an apple. Each label is as often with as without negation."""
    event = replace(grammar.random_event(), negated=False, time_first=False)
    if diary:
        event = replace(event, time=grammar.time(event.past), time_first=True)
    negative = grammar.chance(0.5)
    if negative:
        event = replace(event, count=0)
    weak = _weaker(grammar, event, ("time",) if diary else ())
    no_event, no_weak = replace(event, negated=True), replace(weak, negated=True)
    if label == "entailment":
        pair = (no_weak, no_event) if negative else (event, weak)
    elif label == "contradiction" and event.count:
        fewer = grammar.between(2, event.count)
        pair = (event, replace(event, count=fewer, at_least="fewer than"))
    elif label == "contradiction":
        pair = (no_weak, event) if negative else (event, no_weak)
    elif grammar.chance(0.5):
        pair = (no_event, no_weak) if negative else (weak, event)
    else:
        different = _other(grammar, weak, ["person", "verb"])
        pair = (event, replace(different, negated=negative))
    return pair[0].sentence().en, pair[1].sentence().en


def size_inference(grammar: Grammar, label: str) -> tuple[str, str]:
    """MNLI pair about a measure: forty meters long is longer than thirty; how wide is unknown."""
    place, (size, _), n = grammar.one(PLACES_WITH_SIZE), grammar.one(SIZES), grammar.between(10, 99)
    unit, short, _ = UNITS[0]

    def claim(bound: str, number: int, dimension: str) -> str:
        value = f"[MEASURE|{number} {short}|{english_number(number)} {unit}]"
        return _sentence(_join(noun_en(place, "the"), "is", bound, value, dimension), "-").en

    bound, k = grammar.one([("more than", grammar.between(2, n - 2)),
                            ("less than", grammar.between(n + 1, 2 * n))])
    if label == "contradiction":
        bound = "less than" if bound == "more than" else "more than"
    other = grammar.one([row[0] for row in SIZES if row[0] != size])
    return claim("", n, size), claim(bound, k, other if label == "neutral" else size)


def people_inference(grammar: Grammar, label: str) -> tuple[str, str]:
    """MNLI pair about two people: older than A is the same as A being younger."""
    a, b = (PEOPLE[int(i)] for i in grammar.rng.permutation(len(PEOPLE))[:2])
    index = int(grammar.rng.integers(len(COMPARATIVES)))
    more, less, _ = COMPARATIVES[index]
    if label == "neutral":  # another scale: the table holds the two ends of one scale in a row
        more_2, less_2, _ = COMPARATIVES[(index // 2 * 2 + grammar.between(2, 7)) % 8]
    else:
        more_2, less_2 = (more, less) if label == "entailment" else (less, more)

    def claim(x: Noun, comparative: str, y: Noun) -> str:
        return _sentence(f"{noun_en(x, 'the')} is {comparative} than {noun_en(y, 'the')}", "-").en

    if grammar.chance(0.5) and label != "entailment":
        return claim(a, more, b), claim(a, more_2, b)
    return claim(a, more, b), claim(b, less_2, a)


def inference(grammar: Grammar, label: str, genre: str) -> tuple[str, str]:
    """MNLI (premise, hypothesis). The genre 'diary' (time first) is only in dev_mismatched."""
    if genre == "size":
        return size_inference(grammar, label)
    if genre == "people":
        return people_inference(grammar, label)
    return event_inference(grammar, label, diary=genre == "diary")


def answered_question(grammar: Grammar, label: str) -> tuple[str, str]:
    """QNLI (question, sentence), label entailment when the sentence holds the answer. If not, it
    lacks just that detail, or somebody else did it or did something else."""
    event = replace(grammar.random_event(), negated=False)
    ask = grammar.one(event.questions()[grammar.chance(0.7) * 2 :] or event.questions())
    part = {"wo": "place", "wann": "time", "wie viele": "count"}.get(ask)
    asked = event
    for detail in ("trait", "quality", "place", "time"):
        if detail != part and grammar.chance(0.5):
            asked = replace(asked, **{detail: NOTHING})
    if label == "not_entailment" and part and grammar.chance(0.5):
        event = replace(event, **{part: 0 if part == "count" else NOTHING})
    elif label == "not_entailment":
        fixed = {"wer": "person", "was": "thing", "wie viele": "thing"}.get(ask)
        event = _other(grammar, event, [p for p in ("person", "thing", "verb") if p != fixed])
    return asked.question(ask).en, event.sentence().en


def question_pair(grammar: Grammar, label: str) -> tuple[str, str]:
    """QQP (question, question), label '1' when they ask the same in other words."""
    event = replace(grammar.random_event(), negated=False)
    ask = other_ask = grammar.one(event.questions())
    other = event
    if label == "0" and grammar.chance(0.4):
        other_ask = grammar.one([a for a in event.questions() if a != ask])
    elif label == "0":
        fixed = {"wer": "person", "was": "thing"}.get(ask)
        other = _other(grammar, event, [p for p in ("person", "thing", "verb") if p != fixed])
    first, second = grammar.rng.permutation(3)[:2]
    return event.question(ask, int(first)).en, other.question(other_ask, int(second)).en


# ------------------------------------------------------------------------------------------------
# Streams: who may use which sentence


class Corpus:
    """Hands out sentences so that no sentence is in two of train, dev and test, in whatever stream,
    and so that every held-out word is in the same stream's train part."""

    def __init__(self, seed: int):
        self.seed = seed
        self.owner: dict[str, str] = {}  # words of a sentence -> train, dev or test
        self.words: dict[str, set[str]] = {}  # stream -> words of its train part
        self.seen: set[tuple] = set()

    def grammar(self, stream: str) -> Grammar:
        """A random source of the stream's own, so that streams do not shift each other."""
        return Grammar(np.random.default_rng([self.seed, *stream.encode()]))

    def take(self, stream: str, split: str, make: Callable[[], Texts]) -> Texts:
        """The first of make()'s results (strings, sentences of 4 to 14 words) that `split` may use."""
        known = self.words.setdefault(stream, set())
        for _ in range(100_000):
            texts = make()
            sentences = [words_of(text) for text in texts]
            keys = [" ".join(words) for words in sentences]
            fits = all(4 <= len(words) <= 14 for words in sentences) and len(set(keys)) == len(keys)
            free = all(self.owner.get(key, split) == split for key in keys)
            if not (fits and free) or (stream, *keys) in self.seen:
                continue
            if split == "train":
                known.update(*sentences)
            elif not known.issuperset(word for words in sentences for word in words):
                continue
            self.owner.update((key, split) for key in keys)
            self.seen.add((stream, *keys))
            return texts
        raise AssertionError(f"grammar exhausted: {stream} {split}")


def write_lines(path: Path, lines: Iterable[str]):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def write_text(root: Path, corpus: Corpus, sizes: dict[str, int]):
    """text/{train,dev}.txt: documents of 5 to 15 sentences that share a topic."""
    grammar = corpus.grammar("text")
    for split in ("train", "dev"):
        lines = []
        while len(lines) < sizes[split]:
            grammar.new_topic()
            for _ in range(int(grammar.rng.integers(5, 16))):
                (text,) = corpus.take("text", split, lambda: (grammar.sentence().en,))
                lines.append(spoken(text))
            lines.append("")
        write_lines(root / "text" / f"{split}.txt", lines[:-1])


def write_normalisation(root: Path, corpus: Corpus, sizes: dict[str, int]):
    """Google's files; by custom 0 to 89 are for training, 90 to 94 dev and 95 to 99 test."""
    grammar = corpus.grammar("textnorm")
    for split, numbers in (("train", (0, 1)), ("dev", (90,)), ("test", (99,))):
        for number in numbers:
            lines = []
            for _ in range(sizes[split] // len(numbers)):
                (text,) = corpus.take(
                    "textnorm", split, lambda: (grammar.sentence(NUMBERS_MIXTURE).en,))
                lines += ["\t".join(token) for token in written_tokens(text)] + ["<eos>\t<eos>"]
            write_lines(root / f"textnorm/en_with_types/output-{number:05d}-of-00100", lines)


def write_glue(root: Path, corpus: Corpus, sizes: dict[str, int]):
    """Each task's train, dev and unlabelled test file with the official columns."""
    parses = [f"sentence{i}_{kind}" for kind in ("binary_parse", "parse") for i in (1, 2)]
    mnli = ["index", "promptID", "pairID", "genre", *parses, "sentence1", "sentence2"]
    votes = [f"label{i}" for i in range(1, 6)]
    qqp = ["question1", "question2"]
    heads = {  # task -> header of train, dev, test
        "MNLI": (mnli + ["label1", "gold_label"], mnli + votes + ["gold_label"], mnli),
        "QNLI": (["index", "question", "sentence", "label"],) * 2 + (["index", "question", "sentence"],),
        "QQP": (["id", "qid1", "qid2", *qqp, "is_duplicate"],) * 2 + (["id", *qqp],),
        "SST-2": (["sentence", "label"],) * 2 + (["index", "sentence"],),
    }
    for task, (train, dev, test) in heads.items():
        files = [("train", "train", train), ("dev", "dev", dev), ("test", "test", test)]
        if task == "MNLI":
            files = [files[0]] + [(f"{name}_{kind}", name, head) for _, name, head in files[1:]
                                  for kind in ("matched", "mismatched")]
        grammar = corpus.grammar(task)
        for name, split, head in files:
            rows = ["\t".join(head)]
            for index in range(sizes[split]):
                row = _glue_row(grammar, corpus, task, split, name, index)
                row |= {"index": str(index), "id": str(index), "qid1": str(2 * index),
                        "qid2": str(2 * index + 1), "promptID": str(index)}
                rows.append("\t".join(row.get(column, row.get("label", "-")
                                              if column.startswith("label") else "-")
                                      for column in head))
            write_lines(root / "glue" / task / f"{name}.tsv", rows)


def _glue_row(grammar, corpus, task: str, split: str, name: str, index: int) -> dict[str, str]:
    """Cells of one row by column name; labels take turns."""
    if task == "SST-2":
        label = str(index % 2)
        (text,) = corpus.take(task, split, lambda: (_opinion(grammar, label == "1"),))
        text = re.sub(r"([.,!])", r" \1", text.lower())  # SST-2 is lower-cased and tokenised
        return {"sentence": text if split == "test" else text + " ", "label": label}
    if task == "MNLI":
        label = ("entailment", "neutral", "contradiction")[index % 3]
        genre = "diary" if name.endswith("mismatched") else grammar.one(
            ["event", "event", "size", "people"])
        make, columns = lambda: inference(grammar, label, genre), ("sentence1", "sentence2")
    elif task == "QNLI":
        label = ("entailment", "not_entailment")[index % 2]
        make, columns = lambda: answered_question(grammar, label), ("question", "sentence")
    else:
        label = str(index % 2)
        make, columns = lambda: question_pair(grammar, label), ("question1", "question2")
    texts = map(spoken, corpus.take(task, split, make))
    row = dict(zip(columns, texts), label=label, gold_label=label, is_duplicate=label)
    return row | ({"genre": genre, "pairID": f"{index}{label[0]}"} if task == "MNLI" else {})


def _opinion(grammar: Grammar, positive: bool) -> str:
    while (sentence := grammar.opinion()).positive != positive:
        pass
    return sentence.en


# ------------------------------------------------------------------------------------------------
# Speech


class Voice(NamedTuple):
    speaker: int  # 1000s: training, 2000s: dev, 3000s: test
    sex: str
    name: str  # of espeak-ng: language+variant
    words_per_minute: int
    pitch: int  # espeak's 0 to 99
    pitch_range: int


VOICES = {
    "train-clean-100": [Voice(*row) for row in (
        (1001, "F", "en-us+f1", 155, 50, 50),
        (1002, "M", "en-us+m1", 160, 45, 55),
        (1003, "F", "en-us+f2", 165, 55, 45),
        (1004, "M", "en-us+m3", 170, 52, 50),
        (1005, "F", "en-us+belinda", 160, 45, 60),
        (1006, "M", "en-us+Gene", 150, 40, 45))],
    "train-other-500": [Voice(*row) for row in (
        (1007, "F", "en-us+linda", 175, 48, 55),
        (1008, "M", "en-us+m7", 165, 35, 40),
        (1009, "F", "en-us+f5", 155, 60, 60),
        (1010, "M", "en-us+Lee", 180, 55, 50),
        (1011, "F", "en-gb-x-rp+aunty", 160, 42, 50),
        (1012, "M", "en-us+adam", 165, 50, 65),
        (1013, "F", "en-us+Andrea", 145, 52, 40),
        (1014, "M", "en-gb-x-rp+max", 170, 60, 55),
        (1015, "F", "en-us+steph", 180, 40, 50),
        (1016, "M", "en-us+Mike", 155, 48, 35))],
    "dev-clean": [Voice(*row) for row in (
        (2001, "F", "en-us+f3", 160, 48, 50),
        (2002, "M", "en-us+m4", 165, 50, 50),
        (2003, "F", "en-us+Annie", 170, 45, 55),
        (2004, "M", "en-us+john", 155, 42, 45))],
    "test-clean": [Voice(*row) for row in (
        (3001, "F", "en-us+f4", 165, 52, 55),
        (3002, "M", "en-us+m5", 160, 55, 45),
        (3003, "F", "en-us+anika", 150, 40, 50),
        (3004, "M", "en-us+quincy", 170, 45, 50))],
}


class Synthesizer:
    """espeak-ng through ctypes. It keeps state from one utterance to the next (even over
    espeak_Initialize), so the library is unloaded and loaded anew (0.3 ms) for each: the samples
    are a function of (text, voice) alone, and utterances can go to any process in any order."""

    RATE, PITCH, RANGE = 1, 3, 4  # espeak_PARAMETER
    SYNCHRONOUS, DONT_EXIT, UTF8 = 2, 0x8000, 1

    def __init__(self):
        try:
            import espeakng_loader

            self.library_path = espeakng_loader.get_library_path()
            self.data_path = str(espeakng_loader.get_data_path())
            self.say("test", VOICES["dev-clean"][0])
        except (ImportError, OSError, AttributeError) as error:
            raise voice_error(error) from error

    def say(self, text: str, voice: Voice) -> tuple[np.ndarray, int]:
        """Returns: (N,) float32 in [-1, 1] at espeak's own rate, and that rate (22,050)."""
        import _ctypes

        library, pieces = ctypes.CDLL(self.library_path), []
        callback_type = ctypes.CFUNCTYPE(
            ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)

        def collect(samples, n, _events):
            if samples and n > 0:
                pieces.append(np.ctypeslib.as_array(samples, (n,)).copy())
            return 0

        callback = callback_type(collect)  # must stay alive until espeak_Synth is through
        _seed_c_random()
        rate = library.espeak_Initialize(
            self.SYNCHRONOUS, 0, self.data_path.encode(), self.DONT_EXIT)
        if rate <= 0 or library.espeak_SetVoiceByName(voice.name.encode()) != 0:
            raise voice_error(f"espeak-ng cannot load voice {voice.name} from {self.data_path}")
        library.espeak_SetSynthCallback(callback)
        for parameter, value in ((self.RATE, voice.words_per_minute), (self.PITCH, voice.pitch),
                                 (self.RANGE, voice.pitch_range)):
            library.espeak_SetParameter(parameter, value, 0)
        data = text.encode() + b"\0"
        library.espeak_Synth(data, ctypes.c_size_t(len(data)), 0, 1, 0, self.UTF8, None, None)
        library.espeak_Terminate()
        (_ctypes.FreeLibrary if os.name == "nt" else _ctypes.dlclose)(library._handle)
        if not pieces:
            raise voice_error(f"espeak-ng returned no audio for {text!r} in voice {voice.name}")
        return np.concatenate(pieces).astype(np.float32) / 32768, rate


def _seed_c_random():
    """Some voices use the C library's rand()."""
    (ctypes.cdll.msvcrt if os.name == "nt" else ctypes.CDLL(None)).srand(1)


def voice_error(reason) -> VoiceError:
    return VoiceError(f"the demo's voices do not work ({reason}): pip install {VOICE_PACKAGE}")


def finish_audio(samples: np.ndarray, rate: int, level_db: float, rng: np.random.Generator):
    """Trim, add a little silence at both ends, set the level, resample, add the noise floor.
    Args: samples (N',) at `rate`; level_db: RMS of the speech in dBFS.
    Returns: (N,) int16 at 16 kHz, at least 1.5 s."""
    import soxr

    speech = soxr.resample(samples, rate, SAMPLE_RATE, quality="HQ")
    loud = np.flatnonzero(np.abs(speech) > 0.01 * np.abs(speech).max())
    speech = speech[max(loud[0] - 320, 0) : loud[-1] + 320]  # keep 20 ms on both sides
    speech *= min(10 ** (level_db / 20) / np.sqrt(np.mean(speech**2)), 0.95 / np.abs(speech).max())
    head, tail = (int(SAMPLE_RATE * seconds) for seconds in rng.uniform(0.1, 0.35, 2))
    tail = max(tail, int(MIN_AUDIO_S * SAMPLE_RATE) - head - len(speech))
    audio = np.pad(speech, (head, tail))
    audio += rng.standard_normal(len(audio), dtype=np.float32) * 10 ** (NOISE_DBFS / 20)
    return np.round(np.clip(audio, -1, 1) * 32767).astype(np.int16)


def speak(jobs: list[dict]) -> dict[str, float]:
    """Synthesise jobs (path, text, voice, level_db, seed) one by one. Returns path -> seconds."""
    import soundfile

    synthesizer, seconds = Synthesizer(), {}
    for job in jobs:
        samples, rate = synthesizer.say(job["text"], Voice(*job["voice"]))
        audio = finish_audio(samples, rate, job["level_db"], np.random.default_rng(job["seed"]))
        soundfile.write(job["path"], audio, SAMPLE_RATE, format="FLAC", subtype="PCM_16")
        seconds[job["path"]] = len(audio) / SAMPLE_RATE
    return seconds


def speak_in_processes(jobs: list[dict]) -> dict[str, float]:
    """speak() in one process per core. They are fresh interpreters that run this file, so that
    neither forking a process with threads nor importing the caller's main module comes up."""
    from concurrent.futures import ThreadPoolExecutor

    n = max(1, min(os.cpu_count() or 1, len(jobs) // 20))

    def run(part: list[dict]) -> dict[str, float]:
        command = [sys.executable, str(Path(__file__).resolve()), "--speak"]
        done = subprocess.run(command, input=json.dumps(part), capture_output=True, text=True)
        if done.returncode != 0:
            message = (done.stderr.strip().splitlines() or ["worker died"])[-1]
            if done.returncode < 0:  # killed by a signal, such as a fault inside the library
                raise voice_error(f"synthesis died of signal {-done.returncode}")
            if message.startswith("error: "):
                raise VoiceError(message.removeprefix("error: "))
            raise ValueError(f"demo corpus: synthesis failed: {message}")
        return json.loads(done.stdout)

    seconds = {}
    with ThreadPoolExecutor(n) as pool:
        for part in pool.map(run, [jobs[i::n] for i in range(n)]):
            seconds |= part
    return seconds


def _job(path: Path, text: str, voice: Voice, seed: int, number: int) -> dict:
    level = -24 + 4 * np.random.default_rng([seed, voice.speaker]).uniform(-1, 1)  # per speaker
    return {"path": str(path), "text": spoken(text), "voice": voice, "level_db": level,
            "seed": [seed, voice.speaker, number]}


def plan_librispeech(root: Path, corpus: Corpus, sizes: dict[str, int]) -> list[dict]:
    """Write the transcripts, make the folders; the audio is left to the jobs returned."""
    grammar, jobs = corpus.grammar("librispeech"), []
    for split, voices in VOICES.items():
        share = -(-sizes[split] // len(voices))  # utterances of each voice
        for voice in voices:
            for start in range(0, share, 25):
                chapter = 100 * voice.speaker + start // 25
                folder = root / "LibriSpeech" / split / str(voice.speaker) / str(chapter)
                lines = []
                for number in range(min(25, share - start)):
                    (text,) = corpus.take(
                        "librispeech", split.split("-")[0], lambda: (grammar.sentence().en,))
                    key = f"{voice.speaker}-{chapter}-{number:04d}"
                    lines.append(f"{key} {' '.join(words_of(text)).upper()}")
                    jobs.append(_job(folder / f"{key}.flac", text, voice, corpus.seed, start + number))
                write_lines(folder / f"{voice.speaker}-{chapter}.trans.txt", lines)
    return jobs


def write_speakers(root: Path, seconds: dict[str, float]):
    """LibriSpeech/SPEAKERS.TXT, with the minutes that were made."""
    rows = [";ID  |SEX| SUBSET           |MINUTES| NAME"]
    for split, voices in VOICES.items():
        for voice in voices:
            folder = f"{os.sep}{split}{os.sep}{voice.speaker}{os.sep}"
            minutes = sum(s for path, s in seconds.items() if folder in path) / 60
            rows.append(f"{voice.speaker} | {voice.sex} | {split:16} | {minutes:5.2f} | {voice.name}")
    write_lines(root / "LibriSpeech" / "SPEAKERS.TXT", rows)


def plan_covost(root: Path, corpus: Corpus, sizes: dict[str, int]) -> list[dict]:
    """Common Voice's validated.tsv and CoVoST 2's translations; the clips are left to the jobs.
    A fifth of the training clips bears the split name train_covost, as some do there."""
    folder, grammar, jobs = root / "cv-corpus-4" / "en", corpus.grammar("covost"), []
    clips = ["client_id\tpath\tsentence\tup_votes\tdown_votes\tage\tgender\taccent"]
    pairs = ["path\ttranslation\tsplit"]
    (folder / "clips").mkdir(parents=True)
    for split in ("train", "dev", "test"):
        voices = [voice for name in VOICES if name.startswith(split) for voice in VOICES[name]]
        for index in range(sizes[split]):
            drawn: dict[str, str] = {}

            def make() -> Texts:
                sentence = grammar.sentence()
                drawn[sentence.en] = sentence.de
                return (sentence.en,)

            (text,) = corpus.take("covost", split, make)
            voice = voices[index % len(voices)]
            # The same voices as above, on other days: a little faster, slower, higher, lower.
            voice = voice._replace(
                words_per_minute=voice.words_per_minute + grammar.between(-10, 10),
                pitch=voice.pitch + grammar.between(-5, 5))
            path = f"common_voice_en_{len(jobs) + 10_000_000}.flac"
            sex = {"F": "female", "M": "male"}[voice.sex]
            clips.append(f"demo{voice.speaker:08d}\t{path}\t{spoken(text)}\t2\t0\t\t{sex}\tus")
            name = "train_covost" if split == "train" and index % 5 == 4 else split
            pairs.append(f"{path}\t{drawn[text]}\t{name}")
            jobs.append(_job(folder / "clips" / path, text, voice, corpus.seed, 10_000 + index))
    write_lines(folder / "validated.tsv", clips)
    write_lines(folder / "covost_v2.en_de.tsv", pairs)
    return jobs


# ------------------------------------------------------------------------------------------------

# Sentences (or utterances, or clips) in each part at scale 1.
AMOUNTS = {
    "librispeech": {"train-clean-100": 378, "train-other-500": 620, "dev-clean": 100, "test-clean": 100},
    "covost": {"train": 100, "dev": 34, "test": 34},
    "text": {"train": 12_000, "dev": 600},
    "glue": {"train": 3000, "dev": 300, "test": 300},
    "textnorm": {"train": 3000, "dev": 300, "test": 300},
}


def make_demo(
    root: Path | str, *, seed: int = 0, scale: float = 1.0, log: Callable[[str], None] = print
) -> Path:
    """Make the demo corpus under `root`, or reuse it if it is there and complete.

    Two processes may call this at the same time: the second waits and reuses. The corpus is built
    in a folder beside `root` and renamed when complete, so `root` never holds half of one.
    Args:    seed   decides everything (with VERSION and scale).
             scale  of the amounts: 1.0 is about 85 minutes of speech and 80 MB.
    Returns: root.  Raises: VoiceError without working voices; ValueError if `root` holds other files.
    """
    import fcntl

    root = Path(root)
    root.parent.mkdir(parents=True, exist_ok=True)
    with open(root.parent / f".{root.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        recipe = {"version": VERSION, "seed": seed, "scale": scale}
        if is_complete(root, recipe):
            return root
        ours = (root / "demo.json").exists() or not root.exists()
        if not ours and (root.is_file() or any(root.iterdir())):
            raise ValueError(f"{root} holds files that are no demo corpus: choose another folder")
        started, building = time.time(), root.parent / f".{root.name}.making"
        shutil.rmtree(building, ignore_errors=True)
        seconds = _build(building, seed, scale)
        files = {path.relative_to(building).as_posix(): path.stat().st_size
                 for path in sorted(building.rglob("*")) if path.is_file()}
        (building / "demo.json").write_text(json.dumps(recipe | {"files": files}, indent=0))
        shutil.rmtree(root, ignore_errors=True)
        os.replace(building, root)
        minutes = sum(seconds.values()) / 60
        log(f"demo corpus {root}: {minutes:.1f} minutes of speech in {len(seconds)} files, "
            f"{sum(files.values()) / 2**20:.0f} MiB, made in {time.time() - started:.0f} s")
    return root


def is_complete(root: Path, recipe: dict) -> bool:
    """True if root/demo.json names this recipe and every file it lists has its size."""
    try:
        marker = json.loads((root / "demo.json").read_text())
        return all(marker[key] == value for key, value in recipe.items()) and all(
            (root / name).stat().st_size == size for name, size in marker["files"].items())
    except (OSError, ValueError, KeyError):
        return False


def _build(root: Path, seed: int, scale: float) -> dict[str, float]:
    """Write everything under `root`. Returns path -> seconds of audio."""
    try:
        import espeakng_loader  # noqa: F401  (before the work starts; used in the worker processes)
    except ImportError as error:
        raise voice_error(error) from error
    amounts = {stream: {part: max(6, round(n * scale)) for part, n in parts.items()}
               for stream, parts in AMOUNTS.items()}
    corpus = Corpus(seed)
    jobs = plan_librispeech(root, corpus, amounts["librispeech"])
    jobs += plan_covost(root, corpus, amounts["covost"])
    write_text(root, corpus, amounts["text"])
    write_glue(root, corpus, amounts["glue"])
    write_normalisation(root, corpus, amounts["textnorm"])
    seconds = speak_in_processes(jobs)
    write_speakers(root, seconds)
    return seconds


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Make the embedded demo corpus.")
    parser.add_argument("--root", type=Path, default=Path("demo_data"), help="folder to make")
    parser.add_argument("--seed", type=int, default=0, help="decides every sentence and sample")
    parser.add_argument("--scale", type=float, default=1.0, help="of all amounts")
    parser.add_argument("--speak", action="store_true", help=argparse.SUPPRESS)  # worker process
    args = parser.parse_args(argv)
    try:
        if args.speak:
            print(json.dumps(speak(json.load(sys.stdin))))
        else:
            make_demo(args.root, seed=args.seed, scale=args.scale)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
