"""The embedded demo corpus: speech, text, translations and labels, made in half a minute.

No section of the paper: this file stands in for LibriSpeech, CoVoST 2, GLUE and Google's text
normalisation set when nothing has been downloaded. It writes *their* folder and column layouts, so
that everything downstream runs the loaders that it would run on the real corpora.

  1. A small grammar, written for this project, draws English sentences with German translations:
     agreement, numbers, dates, prices, sentiment, negation; a lexicon of a few hundred words.
  2. Rules derive labels (sentiment, inference, answers, paraphrases) and the written form of
     spoken numbers ("$40" of "forty dollars").
  3. espeak-ng speaks some of the sentences in 24 voices, 8 of which are kept out of training.

espeak-ng is GPL-3 software. It is not part of this project: it is only loaded at run time, in
processes of its own, from the separately installed package espeakng-loader.

Everything is a function of (VERSION, seed, scale). A held-out sentence is in no training file.

Public: make_demo, is_complete, VoiceError.   CLI: python demo.py [--root demo_data] [--seed 0]
Letters: N wave samples.
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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

VERSION = 2  # raise it when the same seed gives other files: older copies are then remade
VOICE_PACKAGE = "espeakng-loader==0.2.4"
SAMPLE_RATE = 16000
NOISE_DBFS = -60.0  # noise floor, so that the log of a silent mel band stays in a natural range
MIN_AUDIO_S = 1.5

# Sentences (utterances, clips, table rows) in each part at scale 1.
AMOUNTS = {
    "librispeech": {
        "train-clean-100": 900,
        "train-other-500": 1400,
        "dev-clean": 116,
        "test-clean": 116,
    },
    "covost": {"train": 1800, "dev": 80, "test": 80},
    "text": {"train": 12_000, "dev": 600},
    "glue": {"train": 3000, "dev": 300, "test": 300},
    "textnorm": {"train": 3000, "dev": 300, "test": 300},
}

# ------------------------------------------------------------------------------------------------
# Lexicon


class Noun(NamedTuple):
    """A noun in both languages, both numbers."""

    en: str
    en_plural: str
    gender: str  # of the German noun: m, f, n
    de: str
    de_plural: str
    category: str = ""


class Verb(NamedTuple):
    """A verb in the forms that the sentences need."""

    base: str  # buy
    third: str  # she buys
    past: str
    de_third: str
    de_plural: str
    participle: str


Pair = tuple[str, str]  # the same in English and in German (of adjectives the stem)
NOTHING = ("", "")


def _rows(table: str) -> list[tuple[str, ...]]:
    """Rows end with semicolons or lines, cells with slashes."""
    rows = re.split(r";\s*|\n\s*", table.strip())
    return [tuple(cell.strip() for cell in row.split("/")) for row in rows if row]


def _nouns(table: str) -> list[Noun]:
    return [Noun(*row) for row in _rows(table)]


PEOPLE = _nouns("""
    teacher/teachers/m/Lehrer/Lehrer; doctor/doctors/m/Arzt/Ärzte; farmer/farmers/m/Bauer/Bauern;
    baker/bakers/m/Bäcker/Bäcker; sister/sisters/f/Schwester/Schwestern;
    brother/brothers/m/Bruder/Brüder; girl/girls/n/Mädchen/Mädchen; boy/boys/m/Junge/Jungen;
    woman/women/f/Frau/Frauen; man/men/m/Mann/Männer; neighbor/neighbors/m/Nachbar/Nachbarn;
    student/students/m/Student/Studenten; singer/singers/m/Sänger/Sänger; cook/cooks/m/Koch/Köche;
    driver/drivers/m/Fahrer/Fahrer; child/children/n/Kind/Kinder; aunt/aunts/f/Tante/Tanten;
    uncle/uncles/m/Onkel/Onkel; painter/painters/m/Maler/Maler; captain/captains/m/Kapitän/Kapitäne;
    grandmother/grandmothers/f/Großmutter/Großmütter;
    grandfather/grandfathers/m/Großvater/Großväter; daughter/daughters/f/Tochter/Töchter;
    queen/queens/f/Königin/Königinnen""")
OBJECTS = _nouns("""
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
    piano/pianos/n/Klavier/Klaviere/instrument; violin/violins/f/Geige/Geigen/instrument""")
CATEGORIES = _nouns("""
    fruit/fruits/f/Frucht/Früchte; vegetable/vegetables/n/Gemüse/Gemüse;
    animal/animals/n/Tier/Tiere; garment/garments/n/Kleidungsstück/Kleidungsstücke;
    container/containers/m/Behälter/Behälter; vehicle/vehicles/n/Fahrzeug/Fahrzeuge;
    instrument/instruments/n/Instrument/Instrumente""")
PLACES_WITH_SIZE = _nouns("""
    river/rivers/m/Fluss/Flüsse; bridge/bridges/f/Brücke/Brücken; wall/walls/f/Mauer/Mauern;
    street/streets/f/Straße/Straßen; tunnel/tunnels/m/Tunnel/Tunnel; tower/towers/m/Turm/Türme;
    canal/canals/m/Kanal/Kanäle; gate/gates/n/Tor/Tore""")
WORKS = _nouns("""
    film/films/m/Film/Filme; book/books/n/Buch/Bücher; song/songs/n/Lied/Lieder;
    concert/concerts/n/Konzert/Konzerte; meal/meals/n/Essen/Essen;
    story/stories/f/Geschichte/Geschichten; soup/soups/f/Suppe/Suppen;
    novel/novels/m/Roman/Romane""")
VEHICLES = _nouns("""
    train/trains/m/Zug/Züge; bus/buses/m/Bus/Busse; ship/ships/n/Schiff/Schiffe""")

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
MOVES = _rows("""
    arrived/angekommen; returned/zurückgekommen; left/abgereist; disappeared/verschwunden""")
# Adjectives: English / German stem.
QUALITIES = _rows("""
    red/rot; green/grün; blue/blau; yellow/gelb; white/weiß; black/schwarz; small/klein; big/groß;
    old/alt; new/neu; heavy/schwer; cheap/billig; beautiful/schön; strange/seltsam""")
TRAITS = _rows("""
    old/alt; young/jung; tall/groß; poor/arm; rich/reich; friendly/freundlich; tired/müde""")
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
TIMES = [(f"on {en}", f"am {de}", "any") for en, de in DAYS]
TIMES += [(f"in {en}", f"im {de}", "any") for en, de in MONTHS]
TIMES += _rows("""
    yesterday/gestern/past; last week/letzte Woche/past; last year/letztes Jahr/past;
    every day/jeden Tag/present; every morning/jeden Morgen/present; today/heute/any;
    in the evening/am Abend/any; at night/in der Nacht/any""")
CITIES = _rows("""
    Berlin/Berlin; Paris/Paris; London/London; Rome/Rom; Vienna/Wien; Madrid/Madrid; Prague/Prag;
    Boston/Boston""")
UNITS = _rows("meters/m/Meter; kilometers/km/Kilometer")
ACRONYMS = ["BBC", "FBI", "USA", "EU", "UN", "IBM", "MIT", "NHL"]

# Determiner -> gender or p(lural) -> German article, adjective ending; '+' marks the accusative.
GERMAN_DETERMINERS = {
    "the": {"m": ("der", "e"), "f": ("die", "e"), "n": ("das", "e"), "p": ("die", "en")},
    "a": {"m": ("ein", "er"), "f": ("eine", "e"), "n": ("ein", "es"), "p": ("", "e")},
    "every": {"m": ("jeder", "e"), "f": ("jede", "e"), "n": ("jedes", "e")},
    "the+": {"m": ("den", "en"), "f": ("die", "e"), "n": ("das", "e"), "p": ("die", "en")},
    "a+": {"m": ("einen", "en"), "f": ("eine", "e"), "n": ("ein", "es"), "p": ("", "e")},
    "no+": {"m": ("keinen", "en"), "f": ("keine", "e"), "n": ("kein", "es"), "p": ("keine", "en")},
}


def _join(*parts: str) -> str:
    return " ".join(part for part in parts if part)


def noun_de(noun: Noun, determiner: str, stem: str = "", plural: bool = False) -> str:
    """German noun phrase with the right article and adjective ending: 'einen roten Apfel'."""
    article, ending = GERMAN_DETERMINERS[determiner]["p" if plural else noun.gender]
    adjective = stem + ending[stem.endswith("e") :] if stem else ""  # müde + er = müder
    return _join(article, adjective, noun.de_plural if plural else noun.de)


def noun_en(noun: Noun, determiner: str, adjective: str = "", plural: bool = False) -> str:
    """English noun phrase; the indefinite article becomes 'an' before a vowel."""
    words = _join(adjective, noun.en_plural if plural else noun.en)
    if determiner == "a":
        determiner = "" if plural else "an" if words[0] in "aeiou" else "a"
    return _join(determiner, words)


def the(noun: Noun, adjective: Pair = NOTHING, plural: bool = False) -> Pair:
    """('the old teacher', 'der alte Lehrer'), as a subject."""
    return (
        noun_en(noun, "the", adjective[0], plural),
        noun_de(noun, "the", adjective[1], plural),
    )


# ------------------------------------------------------------------------------------------------
# Numbers. In a sentence every one stands as [CLASS|written|spoken], so that one string holds the
# spoken sentence (for speech and plain text) and the written one (for text normalisation).

NUMBER = re.compile(r"\[([A-Z]+)\|([^|\]]*)\|([^\]]*)\]")
ONES = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen
    fifteen sixteen seventeen eighteen nineteen""".split()
TENS = "_ _ twenty thirty forty fifty sixty seventy eighty ninety".split()
EINER = """null ein zwei drei vier fünf sechs sieben acht neun zehn elf zwölf dreizehn vierzehn
    fünfzehn sechzehn siebzehn achtzehn neunzehn""".split()
ZEHNER = "_ _ zwanzig dreißig vierzig fünfzig sechzig siebzig achtzig neunzig".split()
ORDINALS = dict(_rows("one/first; two/second; three/third; five/fifth; eight/eighth; nine/ninth"))
ORDINALS["twelve"] = "twelfth"


def english_number(n: int) -> str:
    """0 <= n <= 9999 in words, as in the United States: 'one hundred five'."""
    if n < 20:
        return ONES[n]
    if n < 100:
        return _join(TENS[n // 10], ONES[n % 10] if n % 10 else "")
    unit, name = (1000, "thousand") if n >= 1000 else (100, "hundred")
    return _join(ONES[n // unit], name, english_number(n % unit) if n % unit else "")


def german_number(n: int) -> str:
    """0 <= n <= 9999 in one German word: 'dreiundzwanzig'."""
    if n < 20:
        return "eins" if n == 1 else EINER[n]
    if n < 100:
        return (EINER[n % 10] + "und" if n % 10 else "") + ZEHNER[n // 10]
    unit, name = (1000, "tausend") if n >= 1000 else (100, "hundert")
    return EINER[n // unit] + name + (german_number(n % unit) if n % unit else "")


def english_ordinal(n: int) -> str:
    """3 -> 'third', 21 -> 'twenty first'."""
    *head, last = english_number(n).split()
    regular = (last[:-1] + "ie" if last.endswith("y") else last) + "th"
    return _join(*head, ORDINALS.get(last, regular))


def german_ordinal(n: int) -> str:
    """As it stands after 'am' and 'im': 'am dritten Mai'."""
    irregular = {1: "ersten", 3: "dritten", 7: "siebten", 8: "achten"}
    return irregular.get(n) or german_number(n) + ("ten" if n < 20 else "sten")


def spoken(sentence: str) -> str:
    """'It costs [MONEY|$5|five dollars].' -> 'It costs five dollars.'"""
    return NUMBER.sub(r"\3", sentence)


def words_of(sentence: str) -> list[str]:
    """The spoken words in lower case, nothing but letters and apostrophes."""
    return re.findall(r"[a-z']+", spoken(sentence).lower())


def written_tokens(sentence: str) -> list[tuple[str, str, str]]:
    """(class, before, after) of each token by the convention of Google's text normalisation set:
    after is '<self>' for a plain word and 'sil' for punctuation."""
    tokens = []
    for match in re.finditer(NUMBER.pattern + r"|([\w']+)|([.,?!])", sentence):
        kind, before, after, word, mark = match.groups()
        if kind:
            tokens.append((kind, before, after.lower()))
        else:
            tokens.append(("PLAIN", word, "<self>") if word else ("PUNCT", mark, "sil"))
    return tokens


# ------------------------------------------------------------------------------------------------
# Grammar


class Sentence(NamedTuple):
    """A sentence and its translation."""

    en: str  # may hold numbers as [CLASS|written|spoken]
    de: str
    positive: bool | None = None  # sentiment, where there is one


def _sentence(en: str, de: str = "-", positive: bool | None = None) -> Sentence:
    """Capital letter and full stop (if there is no other mark)."""
    en, de = (text[0].upper() + text[1:] for text in (en, de))
    return Sentence(*(t if t[-1] in "?!" else t + "." for t in (en, de)), positive)


@dataclass(frozen=True)
class Event:
    """Somebody does something to something, somewhere, some time."""

    person: Noun
    verb: Verb
    thing: Noun
    trait: Pair = NOTHING  # of the person
    quality: Pair = NOTHING  # of the thing
    place: Pair = NOTHING
    time: Pair = NOTHING
    time_first: bool = False
    count: int = 0  # of things; 0 stands for a(n)
    bound: str = ""  # 'more than' or 'fewer than', before the count; in English only
    several: bool = False  # people
    past: bool = True
    negated: bool = False
    short: bool = False  # didn't for did not

    @property
    def subject(self) -> Pair:
        return the(self.person, self.trait, self.several)

    @property
    def object(self) -> str:
        if not self.count:
            return noun_en(self.thing, "a", self.quality[0])
        number = f"[CARDINAL|{self.count}|{english_number(self.count)}]"
        return _join(self.bound, number, noun_en(self.thing, "", self.quality[0], True))

    @property
    def auxiliary(self) -> str:
        return "did" if self.past else "do" if self.several else "does"

    @property
    def verb_form(self) -> str:
        if self.negated:
            return self.auxiliary + ("n't " if self.short else " not ") + self.verb.base
        present = self.verb.base if self.several else self.verb.third
        return self.verb.past if self.past else present

    def statement(self) -> Sentence:
        front, end = (self.time[0], "") if self.time_first else ("", self.time[0])
        en = _join(front, self.subject[0], self.verb_form, self.object, self.place[0], end)
        return _sentence(en, self.german())

    def german(self, ask: str = "") -> str:
        """German statement or, with a question word in `ask`, the question for that part."""
        thing = noun_de(
            self.thing, "no+" if self.negated else "a+", self.quality[1], self.count > 0
        )
        if self.count and ask != "wie viele":
            thing = f"{german_number(self.count)} {thing}"
        parts = {"wer": self.subject[1], "wann": self.time[1], "was": thing, "wo": self.place[1]}
        several = self.several and ask != "wer"
        have = ("haben" if several else "hat") if self.past else ""
        finite = have or (self.verb.de_plural if several else self.verb.de_third)
        closing = self.verb.participle if self.past else ""
        front = "wann" if self.time_first and self.time[1] else "wer"
        if ask == "wie viele":
            ask, parts["was"] = f"wie viele {thing}", ""
        first = ask or parts[front]
        rest = [text for name, text in parts.items() if name != (ask or front)]
        return _join(first, finite, *rest, closing) + ("?" if ask else "")

    def questions(self) -> list[str]:
        """The (German) question words to which this event has an answer."""
        words = ["wer", "wie viele" if self.count else "was"]
        return words + ["wo"] * bool(self.place[0]) + ["wann"] * bool(self.time[0])

    def question(self, ask: str, style: int = 0) -> Sentence:
        """The question for one part, in one of three styles with the same meaning."""
        word = ENGLISH_QUESTIONS[ask][style == 1]
        place, time = "" if ask == "wo" else self.place[0], "" if ask == "wann" else self.time[0]
        thing = "" if ask in ("was", "wie viele") else self.object
        if ask == "wie viele":
            word = _join(word, noun_en(self.thing, "", self.quality[0], True))
        if ask == "wer":
            middle = replace(self, several=False).verb_form
        elif style == 2:
            middle = _join(self.subject[0], self.verb_form)
        else:
            middle = _join(self.auxiliary, self.subject[0], self.verb.base)
        start = "do you know" if style == 2 else ""
        return _sentence(_join(start, word, middle, thing, place, time) + "?", self.german(ask))


ENGLISH_QUESTIONS = {
    "wer": ("who", "which person"),
    "was": ("what", "which thing"),
    "wo": ("where", "in which place"),
    "wann": ("when", "at which time"),
    "wie viele": ("how many", "what number of"),
}


class Grammar:
    """Draws sentences. With a topic, one person and one thing come up often."""

    def __init__(self, rng: np.random.Generator):
        self.rng = rng
        self.topic: tuple[Noun, Noun] | None = None

    def sentence(self, mixture: dict[str, int] | None = None) -> Sentence:
        """Mixture: name of a method below -> relative frequency."""
        mixture = mixture or MIXTURE
        pick = self.rng.integers(sum(mixture.values()))
        index = np.searchsorted(np.cumsum(list(mixture.values())), pick, side="right")
        return getattr(self, list(mixture)[index])()

    # Draws of parts

    def one(self, items):
        return items[int(self.rng.integers(len(items)))]

    def chance(self, p: float) -> bool:
        return bool(self.rng.random() < p)

    def between(self, low: int, high: int) -> int:
        """low <= n <= high, but 2 or 102 instead of 1 or 101, whose German forms inflect."""
        n = int(self.rng.integers(low, high + 1))
        return n + (n % 100 == 1)

    def count(self) -> int:
        return self.between(*self.one([(2, 12), (2, 99), (2, 99), (100, 999), (1000, 9999)]))

    def new_topic(self):
        self.topic = (self.one(PEOPLE), self.one(OBJECTS))

    def person(self) -> Noun:
        return self.topic[0] if self.topic and self.chance(0.6) else self.one(PEOPLE)

    def thing(self) -> Noun:
        return self.topic[1] if self.topic and self.chance(0.4) else self.one(OBJECTS)

    def time(self, past: bool) -> Pair:
        fits = ("any", "past" if past else "present")
        return self.one([row[:2] for row in TIMES if row[2] in fits])

    def random_event(self) -> Event:
        past, negated = self.chance(0.6), self.chance(0.2)
        return Event(
            person=self.person(),
            verb=self.one(VERBS),
            thing=self.thing(),
            trait=self.one(TRAITS) if self.chance(0.3) else NOTHING,
            quality=self.one(QUALITIES) if self.chance(0.6) else NOTHING,
            place=self.one(PLACES) if self.chance(0.7) else NOTHING,
            time=self.time(past) if self.chance(0.6) else NOTHING,
            time_first=self.chance(0.25),
            count=self.count() if self.chance(0.3) and not negated else 0,
            several=self.chance(0.3),
            past=past,
            negated=negated,
            short=self.chance(0.4),
        )

    # Kinds of sentences

    def event(self) -> Sentence:
        return self.random_event().statement()

    def question(self) -> Sentence:
        event = replace(self.random_event(), negated=False)
        return event.question(self.one(event.questions()))

    def opinion(self) -> Sentence:
        """Sentiment; negation and 'but' turn it round."""
        work, positive = self.one(WORKS), self.chance(0.5)
        same, opposite = (GOOD, BAD) if positive else (BAD, GOOD)
        (a, a_de), (b, b_de), (c, c_de) = self.one(same), self.one(same), self.one(opposite)
        praise, blame = (LIKED, DISLIKED) if positive else (DISLIKED, LIKED)
        (did, did_de), (never, never_de) = self.one(praise), self.one(blame)
        (very, very_de), (when, when_de) = self.one(DEGREES), self.one(TIMES[:7])[:2]
        (it, it_de), (who, who_de) = the(work), the(self.person())
        it_acc, pronoun = noun_de(work, "the+"), {"m": "er", "f": "sie", "n": "es"}[work.gender]
        an, an_de = noun_en(work, "a", a), noun_de(work, "a", a_de)
        forms = [
            (f"{it} {when} was {very} {a}", f"{it_de} {when_de} war {very_de} {a_de}"),
            (f"{it} was {a} and {very} {b}", f"{it_de} war {a_de} und {very_de} {b_de}"),
            (f"{it} {when} was not {c}", f"{it_de} {when_de} war nicht {c_de}"),
            (f"{it} was {a} and not {c}", f"{it_de} war {a_de} und nicht {c_de}"),
            (f"{who} {did} {it} {when}", f"{who_de} hat {it_acc} {when_de} {did_de}"),
            (f"{who} never {never} {it}", f"{who_de} hat {it_acc} nie {never_de}"),
            (f"what {an} this was!", f"was war das für {an_de}!"),
            (f"{who} thinks {it} was {a}", f"{who_de} denkt, dass {it_de} {a_de} war"),
            (
                f"{it} was {c} at first, but {very} {a} later",
                f"{it_de} war zuerst {c_de}, aber später war {pronoun} {very_de} {a_de}",
            ),
        ]
        return _sentence(*self.one(forms), positive)

    def price(self) -> Sentence:
        plural, dollars, cents = self.chance(0.4), self.count(), self.between(2, 19) * 5
        (it, it_de), said = the(self.thing(), self.one(QUALITIES), plural), english_number(dollars)
        costs, costs_de = ("cost", "kosten") if plural else ("costs", "kostet")
        money, money_de = f"[MONEY|${dollars}|{said} dollars]", f"{german_number(dollars)} Dollar"
        if dollars < 100 and self.chance(0.4):
            said = f"{said} dollars and {english_number(cents)} cents"
            money = f"[MONEY|${dollars}.{cents:02d}|{said}]"
            money_de += f" und {german_number(cents)} Cent"
        return _sentence(f"{it} {costs} {money}", f"{it_de} {costs_de} {money_de}")

    def date(self) -> Sentence:
        several, (move, participle) = self.chance(0.3), self.one(MOVES)
        (who, who_de), (city, city_de) = the(self.person(), NOTHING, several), self.one(CITIES)
        (month, month_de), day = self.one(MONTHS), int(self.rng.integers(1, 29))
        nth, have = english_ordinal(day), "sind" if several else "ist"
        said = self.one(
            [
                f"[DATE|{month} {day}|{month} {nth}]",
                f"[DATE|{day} {month}|the {nth} of {month}]",
            ]
        )
        where, where_de = {
            "arrived": (f"in {city}", f"in {city_de}"),
            "returned": (f"from {city}", f"aus {city_de}"),
        }.get(move, NOTHING)
        return _sentence(
            _join(who, move, where, "on", said),
            _join(who_de, have, f"am {german_ordinal(day)} {month_de}", where_de, participle),
        )

    def year(self) -> Sentence:
        it, it_de = the(
            self.one(PLACES_WITH_SIZE[1:]), self.one(QUALITIES)
        )  # nobody builds a river
        century, rest = self.between(17, 19), self.between(10, 99)
        said = f"{english_number(century)} {english_number(rest)}"
        said_de = f"{german_number(century)}hundert{german_number(rest)}"
        return _sentence(
            f"{it} was built in [DATE|{century}{rest}|{said}]",
            f"{it_de} wurde im Jahr {said_de} gebaut",
        )

    def departure(self) -> Sentence:
        (it, it_de), (city, city_de) = the(self.one(VEHICLES)), self.one(CITIES)
        hour, minute = self.between(2, 12), 5 * int(self.rng.integers(12))
        oh = "oh " if minute < 10 else ""
        said = f"{english_number(hour)} {oh + english_number(minute) if minute else CLOCK}"
        at = f"at [TIME|{hour}:{minute:02d}|{said}]"
        at_de = _join(f"um {german_number(hour)} Uhr", german_number(minute) if minute else "")
        on, on_de = self.one(TIMES[:7])[:2] if self.chance(0.6) else NOTHING
        go, go_de, off = self.one([("to", "nach", "ab"), ("from", "aus", "an")])
        leaves, leaves_de = ("leaves", "fährt") if go == "to" else ("arrives", "kommt")
        return _sentence(
            _join(it, go, city, leaves, at, on),
            _join(it_de, go_de, city_de, leaves_de, on_de, at_de, off),
        )

    def measure(self) -> Sentence:
        (it, it_de), (long, long_de) = the(self.one(PLACES_WITH_SIZE)), self.one(SIZES)
        n, (unit, short, unit_de) = self.count(), self.one(UNITS[: 1 + (long == "long")])
        return _sentence(
            f"{it} is [MEASURE|{n} {short}|{english_number(n)} {unit}] {long}",
            f"{it_de} ist {german_number(n)} {unit_de} {long_de}",
        )

    def weight(self) -> Sentence:
        it, it_de = the(self.thing(), self.one(QUALITIES))
        n, tenth = self.between(2, 40), int(self.rng.integers(1, 10))
        said = f"{english_number(n)} point {english_number(tenth)} kilograms"
        said_de = f"{german_number(n)} Komma {german_number(tenth)} Kilogramm"
        return _sentence(f"{it} weighs [MEASURE|{n}.{tenth} kg|{said}]", f"{it_de} wiegt {said_de}")

    def percent(self) -> Sentence:
        n, (when, when_de) = self.between(2, 99), self.one(TIMES[:19])[:2]
        grew, grew_de = self.one([("rose", "gestiegen"), ("fell", "gefallen")])
        return _sentence(
            f"{when} the price {grew} by [MEASURE|{n}%|{english_number(n)} percent]",
            f"{when_de} ist der Preis um {german_number(n)} Prozent {grew_de}",
        )

    def result(self) -> Sentence:
        (when, when_de), digits = self.one(TIMES[:19])[:2], self.rng.integers(1, 10, 3).tolist()
        (a, b, c), (x, y, z) = map(english_number, digits), map(german_number, digits)
        written = "{}.{}{}".format(*digits)
        return _sentence(
            f"{when} the result was [DECIMAL|{written}|{a} point {b} {c}]",
            f"{when_de} war das Ergebnis {x} Komma {y} {z}",
        )

    def floor(self) -> Sentence:
        several, n = self.chance(0.3), self.between(2, 40)
        who, who_de = the(self.person(), self.one(TRAITS), several)
        live, live_de = ("live", "wohnen") if several else ("lives", "wohnt")
        ending = {1: "st", 2: "nd", 3: "rd"}.get(0 if 10 < n < 20 else n % 10, "th")
        return _sentence(
            f"{who} {live} on the [ORDINAL|{n}{ending}|{english_ordinal(n)}] floor",
            f"{who_de} {live_de} im {german_ordinal(n)} Stock",
        )

    def comparison(self) -> Sentence:
        someone = self.person()
        other = self.one([person for person in PEOPLE if person != someone])
        (a, a_de), (b, b_de) = the(someone), the(other, self.one(TRAITS))
        more, _, more_de = self.one(COMPARATIVES)
        return _sentence(f"{a} is {more} than {b}", f"{a_de} ist {more_de} als {b_de}")

    def fact(self) -> Sentence:
        (who, who_de), thing = the(self.person()), self.thing()
        kind = next(noun for noun in CATEGORIES if noun.en == thing.category)
        every, a_kind = noun_de(thing, "every"), noun_de(kind, "a")
        return _sentence(
            f"{who} knows that every {thing.en} is {noun_en(kind, 'a')}",
            f"{who_de} weiß, dass {every} {a_kind} ist",
        )

    def letters(self) -> Sentence:
        """Only for text normalisation: nobody writes 'b b c' in running text. No German."""
        name, day, who = self.one(ACRONYMS), self.one(DAYS)[0], the(self.person())[0]
        digits = self.rng.integers(0, 10, 7).tolist()
        said = ["o" if digit == 0 else ONES[digit] for digit in digits]
        before = "{}{}{}-{}{}{}{}".format(*digits)
        phone = f"[TELEPHONE|{before}|{_join(*said[:3], 'sil', *said[3:])}]"
        name = f"[LETTERS|{name}|{' '.join(name.lower())}]"
        forms = [f"{who} called the {name} on {day}", f"{who} works for the {name}"]
        return _sentence(self.one([*forms, f"please call {phone} on {day}"]))


CLOCK = "o'clock"
# fmt: off
MIXTURE = {
    "event": 34, "question": 8, "opinion": 17, "price": 6, "date": 6, "year": 4, "departure": 6,
    "measure": 4, "weight": 3, "percent": 2, "result": 1, "floor": 3, "comparison": 4, "fact": 2,
}
NUMBERS_MIXTURE = {  # of text normalisation
    "event": 25, "price": 12, "date": 12, "year": 8, "departure": 10, "measure": 7, "weight": 6,
    "percent": 5, "result": 6, "floor": 7, "letters": 8,
}
# fmt: on

# ------------------------------------------------------------------------------------------------
# GLUE: sentences and pairs with labels that follow from rules. Each function draws one example
# for a label; the genre matters to MNLI only.

Example = tuple[Sentence, ...]


def other_event(grammar: Grammar, event: Event, but: str = "") -> Event:
    """The event with another person, thing or verb (but not `but`), never the same category."""
    part = grammar.one([name for name in ("person", "thing", "verb") if name != but])
    old = getattr(event, part)
    pool = {"person": PEOPLE, "thing": OBJECTS, "verb": VERBS}[part]
    if part == "thing":
        return replace(event, thing=grammar.one([n for n in pool if n.category != old.category]))
    return replace(event, **{part: grammar.one([new for new in pool if new != old])})


def weaker_event(grammar: Grammar, event: Event, keep: str = "") -> Event:
    """An event that must have happened if the given one did: details left out, a fruit for an
    apple, 'more than ten' for twenty."""
    details = [
        n for n in ("trait", "quality", "place", "time") if getattr(event, n)[0] and n != keep
    ]
    changes: list[dict] = [{name: NOTHING} for name in details]
    changes += [{"thing": noun} for noun in CATEGORIES if noun.en == event.thing.category]
    if event.count > 3:
        changes.append({"count": grammar.between(2, event.count - 2), "bound": "more than"})
    for index in grammar.rng.permutation(len(changes))[: 1 + grammar.chance(0.4)]:
        event = replace(event, **changes[int(index)])
    return event


def event_inference(grammar: Grammar, label: str, diary: bool) -> Example:
    """Under negation entailment runs the other way: who did not buy a fruit did not buy an apple.
    Entailed and neutral hypotheses are negated as often as contradictions are."""
    event = replace(grammar.random_event(), negated=False, time_first=False)
    if diary:
        event = replace(event, time=grammar.time(event.past), time_first=True)
    negative = grammar.chance(0.5)  # the premise of contradictions, both sentences of the others
    if negative:
        event = replace(event, count=0)
    weak = weaker_event(grammar, event, keep="time" if diary else "")
    no_event, no_weak = replace(event, negated=True), replace(weak, negated=True)
    if label == "entailment":
        pair = (no_weak, no_event) if negative else (event, weak)
    elif label == "contradiction" and event.count:
        fewer = grammar.between(2, event.count)
        pair = (event, replace(event, count=fewer, bound="fewer than"))
    elif label == "contradiction":
        pair = (no_weak, event) if negative else (event, no_weak)
    elif grammar.chance(0.5):
        pair = (no_event, no_weak) if negative else (weak, event)
    else:
        pair = (event, replace(other_event(grammar, weak, but="thing"), negated=negative))
    return pair[0].statement(), pair[1].statement()


def size_inference(grammar: Grammar, label: str) -> Example:
    """Forty meters long is more than thirty meters long; how wide it is nobody knows."""
    it, (size, _), n = (
        the(grammar.one(PLACES_WITH_SIZE))[0],
        grammar.one(SIZES),
        grammar.between(10, 99),
    )
    more, less = ("more than", grammar.between(1, n - 1)), (
        "less than",
        grammar.between(n + 1, 2 * n),
    )
    bound, k = grammar.one([more, less])
    if label == "contradiction":
        bound = {"more than": "less than", "less than": "more than"}[bound]
    other = grammar.one([row[0] for row in SIZES if row[0] != size])
    return (
        _sentence(f"{it} is {english_number(n)} meters {size}"),
        _sentence(
            f"{it} is {bound} {english_number(k)} meters {other if label == 'neutral' else size}"
        ),
    )


def people_inference(grammar: Grammar, label: str) -> Example:
    """If A is older than B, B is younger than A."""
    a, b = (the(PEOPLE[int(i)])[0] for i in grammar.rng.permutation(len(PEOPLE))[:2])
    more, less, _ = grammar.one(COMPARATIVES)
    premise = _sentence(f"{a} is {more} than {b}")
    if label == "entailment":
        return premise, _sentence(f"{b} is {less} than {a}")
    if label == "neutral":  # another scale
        less = more = grammar.one([row[0] for row in COMPARATIVES if row[0] not in (more, less)])
    claims = [f"{a} is {less} than {b}", f"{b} is {more} than {a}"]
    return premise, _sentence(grammar.one(claims))


def inference(grammar: Grammar, label: str, genre: str) -> Example:
    """MNLI (premise, hypothesis). The mismatched files have a genre of their own: time first."""
    if genre == "size":
        return size_inference(grammar, label)
    if genre == "people":
        return people_inference(grammar, label)
    return event_inference(grammar, label, diary=genre == "diary")


def answered_question(grammar: Grammar, label: str, genre: str) -> Example:
    """QNLI (question, sentence), entailment if the sentence holds the answer. If not, it lacks just
    that, or somebody else did it or did something else."""
    event = replace(grammar.random_event(), negated=False)
    ask = grammar.one(event.questions())
    asked_part = {"wo": "place", "wann": "time"}.get(ask, "")
    dropped = [n for n in ("trait", "quality", "place", "time") if grammar.chance(0.5)]
    asked = replace(event, **{name: NOTHING for name in dropped if name != asked_part})
    if label == "not_entailment" and ask == "wie viele" and grammar.chance(0.5):
        event = replace(event, count=0)
    elif label == "not_entailment" and asked_part and grammar.chance(0.5):
        event = replace(event, **{asked_part: NOTHING})
    elif label == "not_entailment":
        event = other_event(grammar, event, but={"wer": "person", "was": "thing"}.get(ask, ""))
    return asked.question(ask), event.statement()


def question_pair(grammar: Grammar, label: str, genre: str) -> Example:
    """QQP (question, question), label 1 when they ask the same thing in other words."""
    event = other = replace(grammar.random_event(), negated=False)
    ask = other_ask = grammar.one(event.questions())
    if label == "0" and grammar.chance(0.4):
        other_ask = grammar.one([word for word in event.questions() if word != ask])
    elif label == "0":
        other = other_event(grammar, event, but={"wer": "person", "was": "thing"}.get(ask, ""))
    first, second = grammar.rng.permutation(3)[:2].tolist()
    return event.question(ask, first), other.question(other_ask, second)


def opinion(grammar: Grammar, label: str, genre: str) -> Example:
    """SST-2 (sentence,), label 1 if positive."""
    while (sentence := grammar.opinion()).positive != (label == "1"):
        pass
    return (sentence,)


class GlueTask(NamedTuple):
    """How a GLUE task is made and how its files look."""

    make: Callable[[Grammar, str, str], Example]
    labels: tuple[str, ...]
    texts: tuple[str, ...]  # the columns that the example goes to
    files: dict[str, str]  # name -> header
    genres: tuple[str, ...] = ("",)


_PARSES = "sentence1_binary_parse sentence2_binary_parse sentence1_parse sentence2_parse"
_MNLI = f"index promptID pairID genre {_PARSES} sentence1 sentence2"
_MNLI_DEV = f"{_MNLI} label1 label2 label3 label4 label5 gold_label"
_QQP = "id qid1 qid2 question1 question2 is_duplicate"
GLUE = {
    "MNLI": GlueTask(
        inference,
        ("entailment", "neutral", "contradiction"),
        ("sentence1", "sentence2"),
        {
            "train": f"{_MNLI} label1 gold_label",
            "dev_matched": _MNLI_DEV,
            "dev_mismatched": _MNLI_DEV,
            "test_matched": _MNLI,
            "test_mismatched": _MNLI,
        },
        genres=("event", "event", "size", "people"),
    ),
    "QNLI": GlueTask(
        answered_question,
        ("entailment", "not_entailment"),
        ("question", "sentence"),
        dict.fromkeys(("train", "dev"), "index question sentence label")
        | {"test": "index question sentence"},
    ),
    "QQP": GlueTask(
        question_pair,
        ("0", "1"),
        ("question1", "question2"),
        {"train": _QQP, "dev": _QQP, "test": "id question1 question2"},
    ),
    "SST-2": GlueTask(
        opinion,
        ("0", "1"),
        ("sentence",),
        {"train": "sentence label", "dev": "sentence label", "test": "index sentence"},
    ),
}

# ------------------------------------------------------------------------------------------------
# Text files


class Corpus:
    """Hands out sentences so that none is in two of train, dev and test, in whatever stream, and
    every word that is held out in a stream is also in that stream's train part."""

    def __init__(self, seed: int):
        self.seed = seed
        self.owner: dict[str, str] = {}  # words of a sentence -> train, dev or test
        self.train_words: dict[str, set[str]] = {}  # by stream
        self.taken: set[tuple[str, ...]] = set()

    def grammar(self, stream: str) -> Grammar:
        """A random source of the stream's own."""
        return Grammar(np.random.default_rng([self.seed, *stream.encode()]))

    def take(self, stream: str, split: str, make: Callable[[], Example]) -> Example:
        """The first new example of make() that fits `split`; sentences have 4 to 14 words."""
        known = self.train_words.setdefault(stream, set())
        for _ in range(100_000):
            example = make()
            words = [words_of(sentence.en) for sentence in example]
            keys = [" ".join(sentence) for sentence in words]
            if not all(4 <= len(sentence) <= 14 for sentence in words):
                continue
            if len({*keys}) < len(keys) or (stream, *keys) in self.taken:
                continue
            if any(self.owner.get(key, split) != split for key in keys):
                continue
            if split == "train":
                known.update(*words)
            elif not known.issuperset(sum(words, [])):
                continue
            self.owner |= dict.fromkeys(keys, split)
            self.taken.add((stream, *keys))
            return example
        raise AssertionError(f"the grammar is exhausted: {stream} {split}")


def write_lines(path: Path, lines: Iterable[str]):
    """Write lines to a file, making its folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def write_text(root: Path, corpus: Corpus, amounts: dict[str, int]):
    """text/{train,dev}.txt: documents of 5 to 15 sentences, each with a topic."""
    grammar = corpus.grammar("text")
    for split, amount in amounts.items():
        lines: list[str] = []
        while amount > 0:
            grammar.new_topic()
            length = int(grammar.rng.integers(5, 16))
            for _ in range(length):
                (sentence,) = corpus.take("text", split, lambda: (grammar.sentence(),))
                lines.append(spoken(sentence.en))
            lines.append("")
            amount -= length
        write_lines(root / "text" / f"{split}.txt", lines[:-1])


def write_normalisation(root: Path, corpus: Corpus, amounts: dict[str, int]):
    """Google's files, where by custom 0 to 89 are for training, 90 to 94 dev and 95 to 99 test."""
    grammar = corpus.grammar("textnorm")
    for split, numbers in {"train": (0, 1), "dev": (90,), "test": (99,)}.items():
        for number in numbers:
            lines: list[str] = []
            for _ in range(amounts[split] // len(numbers)):
                make = partial(grammar.sentence, NUMBERS_MIXTURE)
                (sentence,) = corpus.take("textnorm", split, lambda make=make: (make(),))
                lines += ["\t".join(token) for token in written_tokens(sentence.en)]
                lines.append("<eos>\t<eos>")
            write_lines(root / f"textnorm/en_with_types/output-{number:05d}-of-00100", lines)


def write_glue(root: Path, corpus: Corpus, amounts: dict[str, int]):
    """Each task's train, dev and unlabelled test files, labels taking turns."""
    for name, task in GLUE.items():
        grammar = corpus.grammar(name)
        for file, header in task.files.items():
            split, columns = file.split("_")[0], header.split()
            rows = [columns]
            for index in range(amounts[split]):
                label = task.labels[index % len(task.labels)]
                genre = "diary" if "mismatched" in file else grammar.one(task.genres)
                make = partial(task.make, grammar, label, genre)
                texts = [spoken(sentence.en) for sentence in corpus.take(name, split, make)]
                if (
                    name == "SST-2"
                ):  # lower-cased and tokenised; a space at the end, but not in test
                    end = "" if split == "test" else " "
                    texts = [re.sub(r"([.,!])", r" \1", texts[0].lower()) + end]
                numbers = {"qid1": 2 * index, "qid2": 2 * index + 1}
                row = {
                    c: str(numbers.get(c, index)) for c in columns if re.search("id|index", c, re.I)
                }
                row |= {c: label for c in columns if re.search("label|duplicate", c)}
                row |= {"genre": genre} | dict(zip(task.texts, texts, strict=True))
                rows.append([row.get(column, "-") for column in columns])
            write_lines(root / "glue" / name / f"{file}.tsv", map("\t".join, rows))


# ------------------------------------------------------------------------------------------------
# Speech


class Voice(NamedTuple):
    """One speaker of the demo."""

    speaker: int  # 1000s train, 2000s dev, 3000s test
    sex: str
    name: str  # espeak-ng's language+variant
    words_per_minute: int
    pitch: int  # espeak's 0 to 99
    pitch_range: int


# Left out on purpose: f2, f3, f5, whisper and a few more, whose breath noise reads uninitialised
# memory in espeak-ng 1.52 and so differs from run to run.
# fmt: off
VOICES = {split: [Voice(*row) for row in rows] for split, rows in {
    "train-clean-100": [
        (1001, "F", "en-us+f1", 145, 50, 50),
        (1002, "M", "en-us+m1", 150, 45, 55),
        (1003, "F", "en-us+belinda", 150, 45, 60),
        (1004, "M", "en-us+m3", 160, 52, 50),
        (1005, "F", "en-us+f4", 155, 55, 45),
        (1006, "M", "en-us+Gene", 140, 40, 45),
    ],
    "train-other-500": [
        (1007, "F", "en-us+Annie", 165, 48, 55),
        (1008, "M", "en-us+m7", 155, 35, 40),
        (1009, "F", "en-us+shelby", 145, 60, 60),
        (1010, "M", "en-us+Denis", 170, 55, 50),
        (1011, "F", "en-gb-x-rp+steph", 160, 42, 50),
        (1012, "M", "en-us+adam", 155, 50, 65),
        (1013, "F", "en-us+grandma", 140, 52, 40),
        (1014, "M", "en-gb-x-rp+max", 160, 60, 55),
        (1015, "M", "en-us+pablo", 170, 40, 50),
        (1016, "M", "en-us+Michael", 145, 48, 35),
    ],
    "dev-clean": [
        (2001, "F", "en-us+linda", 150, 48, 50),
        (2002, "M", "en-us+john", 155, 50, 50),
        (2003, "F", "en-us+anika", 160, 40, 55),
        (2004, "M", "en-us+m8", 145, 42, 45),
    ],
    "test-clean": [
        (3001, "F", "en-us+Andrea", 140, 45, 55),
        (3002, "M", "en-us+m5", 150, 55, 45),
        (3003, "F", "en-us+aunty", 160, 40, 50),
        (3004, "M", "en-us+quincy", 160, 45, 50),
    ],
}.items()}
# fmt: on


class VoiceError(ValueError):
    """The speech synthesis library is missing or does not work."""


def voice_error(reason: object) -> VoiceError:
    """The one-line error for voices that cannot be used."""
    return VoiceError(f"the demo's voices do not work ({reason}): pip install {VOICE_PACKAGE}")


class Synthesizer:
    """espeak-ng through ctypes. The library keeps state from one utterance to the next, even over
    espeak_Initialize, and some voices use C's rand(). So it is loaded anew (0.3 ms) and rand() is
    seeded for each: samples are a function of (text, voice), whatever the process and the order."""

    RATE, PITCH, RANGE = 1, 3, 4  # espeak_PARAMETER
    SYNCHRONOUS, DONT_EXIT, UTF8 = 2, 0x8000, 1

    def __init__(self):
        try:
            import espeakng_loader

            self.library_path = str(espeakng_loader.get_library_path())
            self.data_path = str(espeakng_loader.get_data_path())
            self.say("test", VOICES["dev-clean"][0])
        except (ImportError, OSError, AttributeError) as error:
            raise voice_error(error) from error

    def say(self, text: str, voice: Voice) -> tuple[np.ndarray, int]:
        """Returns: (N,) float32 in [-1, 1] at espeak's own rate, and that rate, 22,050 Hz."""
        import _ctypes

        pieces: list[np.ndarray] = []

        @ctypes.CFUNCTYPE(
            ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p
        )
        def collect(samples, n, _events):
            if samples and n > 0:
                pieces.append(np.ctypeslib.as_array(samples, (n,)).copy())
            return 0

        ctypes.CDLL(None).srand(1)
        espeak = ctypes.CDLL(self.library_path)
        rate = espeak.espeak_Initialize(
            self.SYNCHRONOUS, 0, self.data_path.encode(), self.DONT_EXIT
        )
        if rate <= 0 or espeak.espeak_SetVoiceByName(voice.name.encode()) != 0:
            raise voice_error(f"espeak-ng finds no voice {voice.name} in {self.data_path}")
        espeak.espeak_SetSynthCallback(collect)
        espeak.espeak_SetParameter(self.RATE, voice.words_per_minute, 0)
        espeak.espeak_SetParameter(self.PITCH, voice.pitch, 0)
        espeak.espeak_SetParameter(self.RANGE, voice.pitch_range, 0)
        data = text.encode() + b"\0"
        espeak.espeak_Synth(data, ctypes.c_size_t(len(data)), 0, 1, 0, self.UTF8, None, None)
        espeak.espeak_Terminate()
        _ctypes.dlclose(espeak._handle)
        if not pieces:
            raise voice_error(f"espeak-ng returned no audio for {text!r} in voice {voice.name}")
        return np.concatenate(pieces).astype(np.float32) / 32768, rate


def finish_audio(
    samples: np.ndarray, rate: int, level_db: float, rng: np.random.Generator
) -> np.ndarray:
    """Resample, trim, set the level, put a little silence at both ends and a noise floor under all.

    Args:    samples (N',) float32 at `rate`; level_db the wanted RMS of the speech in dBFS.
    Returns: (N,) int16 at 16 kHz, at least 1.5 s.
    """
    import soxr

    speech = soxr.resample(samples, rate, SAMPLE_RATE, quality="HQ")
    peak = np.abs(speech).max()
    loud = np.flatnonzero(np.abs(speech) > 0.01 * peak)
    speech = speech[max(loud[0] - 320, 0) : loud[-1] + 320]  # 20 ms more on both sides
    gain = min(10 ** (level_db / 20) / np.sqrt(np.mean(speech**2)), 0.95 / peak)
    head, tail = (int(SAMPLE_RATE * seconds) for seconds in rng.uniform(0.1, 0.35, 2))
    tail = max(tail, int(MIN_AUDIO_S * SAMPLE_RATE) - head - len(speech))
    audio = np.pad(gain * speech, (head, tail))
    audio += 10 ** (NOISE_DBFS / 20) * rng.standard_normal(len(audio))
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


def _speak_in_process(jobs: list[dict]) -> dict[str, float]:
    """speak() in a fresh interpreter that runs this file: no fork of a process with threads, no
    import of the caller's main module, no GPL library in the caller's process."""
    command = [sys.executable, str(Path(__file__).resolve()), "--speak"]
    done = subprocess.run(command, input=json.dumps(jobs), capture_output=True, text=True)
    if done.returncode < 0:
        raise voice_error(f"the synthesis process died of signal {-done.returncode}")
    if done.returncode > 0:
        message = done.stderr.strip().splitlines()[-1]
        if message.startswith("error: "):
            raise VoiceError(message.removeprefix("error: "))
        raise ValueError(f"demo corpus: the synthesis process failed: {message}")
    return json.loads(done.stdout)


def speak_in_processes(jobs: list[dict]) -> dict[str, float]:
    """speak() on every core."""
    n = max(1, min(os.cpu_count() or 1, len(jobs) // 20))
    with ThreadPoolExecutor(n) as pool:
        parts = pool.map(_speak_in_process, [jobs[i::n] for i in range(n)])
        return {path: seconds for part in parts for path, seconds in part.items()}


def _job(path: Path, sentence: Sentence, voice: Voice, seed: int, number: int) -> dict:
    level_db = -24 + np.random.default_rng([seed, voice.speaker]).uniform(-4, 4)  # the speaker's
    text, seeds = spoken(sentence.en), [seed, voice.speaker, number]
    return dict(path=str(path), text=text, voice=voice, level_db=level_db, seed=seeds)


def plan_librispeech(root: Path, corpus: Corpus, amounts: dict[str, int]) -> list[dict]:
    """Write folders and transcripts. Returns the jobs that make the audio."""
    grammar, jobs = corpus.grammar("librispeech"), []
    for split, voices in VOICES.items():
        for i, voice in enumerate(voices):
            chapters: dict[int, list[str]] = {}
            for n in range(len(range(i, amounts[split], len(voices)))):
                chapter = 100 * voice.speaker + n // 25
                key = f"{voice.speaker}-{chapter}-{n % 25:04d}"
                make = lambda: (grammar.sentence(),)  # noqa: E731
                (sentence,) = corpus.take("librispeech", split.split("-")[0], make)
                words = " ".join(words_of(sentence.en)).upper()
                chapters.setdefault(chapter, []).append(f"{key} {words}")
                path = root / f"LibriSpeech/{split}/{voice.speaker}/{chapter}/{key}.flac"
                jobs.append(_job(path, sentence, voice, corpus.seed, n))
            for chapter, lines in chapters.items():
                folder = root / f"LibriSpeech/{split}/{voice.speaker}/{chapter}"
                write_lines(folder / f"{voice.speaker}-{chapter}.trans.txt", lines)
    return jobs


def plan_covost(root: Path, corpus: Corpus, amounts: dict[str, int]) -> list[dict]:
    """Common Voice's table of clips and CoVoST 2's of translations. Returns the jobs that make the
    clips. The voices are those above, each clip a little faster, slower, higher or lower. A fifth
    of the training clips is marked train_covost, a split that CoVoST 2 adds to Common Voice's."""
    folder, grammar, jobs = root / "cv-corpus-4" / "en", corpus.grammar("covost"), []
    clips = ["client_id path sentence up_votes down_votes age gender accent".split()]
    pairs = ["path translation split".split()]
    for split, amount in amounts.items():
        voices = [v for name, voices in VOICES.items() if name.startswith(split) for v in voices]
        for i in range(amount):
            (sentence,) = corpus.take("covost", split, lambda: (grammar.sentence(),))
            voice = voices[i % len(voices)]
            faster, higher = grammar.rng.integers(-10, 11), grammar.rng.integers(-5, 6)
            voice = voice._replace(
                words_per_minute=voice.words_per_minute + int(faster),
                pitch=voice.pitch + int(higher),
            )
            name = f"common_voice_en_{10_000_000 + len(jobs)}.flac"
            gender = {"F": "female", "M": "male"}[voice.sex]
            accent = "us" if voice.name.startswith("en-us") else "england"
            text = spoken(sentence.en)
            clips.append([f"client{voice.speaker}", name, text, "2", "0", "", gender, accent])
            mark = "train_covost" if split == "train" and i % 5 == 4 else split
            pairs.append([name, sentence.de, mark])
            jobs.append(_job(folder / "clips" / name, sentence, voice, corpus.seed, 10_000 + i))
    (folder / "clips").mkdir(parents=True)
    write_lines(folder / "validated.tsv", map("\t".join, clips))
    write_lines(folder / "covost_v2.en_de.tsv", map("\t".join, pairs))
    return jobs


def write_speakers(root: Path, seconds: dict[str, float]):
    """LibriSpeech/SPEAKERS.TXT, with the minutes that were made."""
    rows = [";ID  |SEX| SUBSET           |MINUTES| NAME"]
    for split, voices in VOICES.items():
        for speaker, sex, name, *_ in voices:
            folder = str(root / "LibriSpeech" / split / str(speaker)) + os.sep
            minutes = sum(s for path, s in seconds.items() if path.startswith(folder)) / 60
            rows.append(f"{speaker} | {sex} | {split:16} | {minutes:5.2f} | {name}")
    write_lines(root / "LibriSpeech" / "SPEAKERS.TXT", rows)


# ------------------------------------------------------------------------------------------------
# The corpus


def make_demo(
    root: Path | str, *, seed: int = 0, scale: float = 1.0, log: Callable[[str], None] = print
) -> Path:
    """Make the demo corpus under `root`, or reuse it if it is there and complete.

    Of two processes that call this at once, one makes it and the other waits. It is built in a
    folder beside `root` that is renamed when complete, so `root` never holds half a corpus. An
    incomplete corpus, or one of another recipe, is replaced with all that lies in its folder.

    Args:    seed   decides everything, together with VERSION and scale.
             scale  of all amounts; 1.0 gives 150 minutes of speech and 175 MiB; train parts have at
                    least 40 rows and the others 6.
    Returns: root.
    Raises:  VoiceError without working voices; ValueError if `root` holds something else.
    """
    import fcntl

    root = Path(root)
    root.parent.mkdir(parents=True, exist_ok=True)
    with open(root.parent / f".{root.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if is_complete(root, seed, scale):
            return root
        foreign = root.exists() and not (root / "demo.json").exists()
        if foreign and (root.is_file() or any(root.iterdir())):
            raise ValueError(f"{root} holds files but no demo corpus: choose another folder")
        started, building = time.time(), root.parent / f".{root.name}.making"
        shutil.rmtree(building, ignore_errors=True)
        seconds = _build(building, seed, scale)
        files = {
            path.relative_to(building).as_posix(): path.stat().st_size
            for path in sorted(building.rglob("*"))
            if path.is_file()
        }
        (building / "demo.json").write_text(
            json.dumps(_recipe(seed, scale) | {"files": files}, indent=0)
        )
        shutil.rmtree(root, ignore_errors=True)
        os.replace(building, root)
    hours, size = sum(seconds.values()) / 3600, sum(files.values()) / 2**20
    log(
        f"demo corpus {root}: {hours:.2f} hours of speech in {len(seconds)} utterances, "
        f"{size:.0f} MiB, made in {time.time() - started:.0f} s"
    )
    return root


def _recipe(seed: int, scale: float) -> dict[str, float]:
    return {"version": VERSION, "seed": seed, "scale": scale}


def is_complete(root: Path, seed: int = 0, scale: float = 1.0) -> bool:
    """True if root/demo.json names this recipe and every file that it lists has its size."""
    try:
        marker = json.loads((root / "demo.json").read_text())
        same = all(marker[key] == value for key, value in _recipe(seed, scale).items())
        return same and all((root / n).stat().st_size == s for n, s in marker["files"].items())
    except (OSError, ValueError, KeyError):
        return False


def _build(root: Path, seed: int, scale: float) -> dict[str, float]:
    """Write everything under `root`. Returns path -> seconds of each audio file."""
    try:
        import espeakng_loader  # noqa: F401  (fail early: the worker processes use it)
    except ImportError as error:
        raise voice_error(error) from error
    amounts = {
        stream: {
            part: max(40 if "train" in part else 6, round(n * scale)) for part, n in parts.items()
        }
        for stream, parts in AMOUNTS.items()
    }
    corpus = Corpus(seed)
    jobs = plan_librispeech(root, corpus, amounts["librispeech"])
    jobs += plan_covost(root, corpus, amounts["covost"])
    write_text(root, corpus, amounts["text"])
    write_glue(root, corpus, amounts["glue"])
    write_normalisation(root, corpus, amounts["textnorm"])
    seconds = speak_in_processes(jobs)
    write_speakers(root, seconds)
    return seconds


def summary(root: Path) -> str:
    """Minutes and utterances of each part, sentences of each text file."""
    import soundfile

    lines = []
    for folder in [*sorted((root / "LibriSpeech").glob("*/")), root / "cv-corpus-4/en/clips"]:
        seconds = [soundfile.info(path).duration for path in folder.rglob("*.flac")]
        if seconds:
            minutes, name = sum(seconds) / 60, folder.relative_to(root)
            lines.append(f"{minutes:8.1f} min {len(seconds):6} utterances  {name}")
    for path in sorted([*root.glob("text/*.txt"), *root.glob("glue/*/*.tsv")]):
        n = sum(1 for line in path.read_text(encoding="utf-8").splitlines() if line)
        n -= path.suffix == ".tsv"  # header
        lines.append(
            f"{n:12} {'sentences' if path.suffix == '.txt' else 'rows'}  {path.relative_to(root)}"
        )
    for path in sorted(root.glob("textnorm/*/*")):
        n = path.read_text(encoding="utf-8").count("<eos>\t<eos>")
        lines.append(f"{n:12} sentences  {path.relative_to(root)}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Make the corpus under --root; a user's mistake is one line and exit status 2."""
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
            print(summary(make_demo(args.root, seed=args.seed, scale=args.scale)))
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
