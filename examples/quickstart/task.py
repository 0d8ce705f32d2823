"""The quickstart's toy task, "clinic notes": prompts, rubrics whose truth is a regular expression, and a writer.

A prompt names two symptoms in lay words, a drug and an allergy by brand name. A good note uses clinical and generic
names, so nothing in it can be copied from the prompt. Ten weighted criteria judge it, each decided by key words that
stand in one sentence. Everything is a pure function of the random generator given. Not medical advice.
"""

import hashlib
import random
import re
from dataclasses import dataclass

from g2r_megatron.data.types import Query, RubricItem

# lay words (prompt) -> clinical name (note, rubric), key word of the fitting advice, its second word
SYMPTOMS = (
    ("head hurts", "cephalalgia", "dim", "light"),
    ("feeling sick", "nausea", "ginger", "tea"),
    ("cannot sleep", "insomnia", "fixed", "bedtime"),
    ("itchy skin", "pruritus", "cool", "bath"),
    ("stuffy nose", "rhinitis", "warm", "steam"),
    ("room spins", "vertigo", "slow", "turns"),
    ("throat burns", "pharyngitis", "honey", "lozenges"),
    ("loose stools", "diarrhea", "clear", "fluids"),
    ("blocked bowels", "constipation", "more", "fiber"),
    ("sore legs", "myalgia", "gentle", "stretching"),
    ("always tired", "fatigue", "morning", "walks"),
    ("red eyes", "conjunctivitis", "lid", "cleaning"),
)
# brand name (prompt) -> generic name (note, rubric); both the drug taken and the allergen come from here
DRUGS = (
    ("tylenol", "paracetamol"),
    ("advil", "ibuprofen"),
    ("lipitor", "atorvastatin"),
    ("prozac", "fluoxetine"),
    ("zoloft", "sertraline"),
    ("ventolin", "salbutamol"),
    ("lasix", "furosemide"),
    ("coumadin", "warfarin"),
    ("amoxil", "amoxicillin"),
    ("keflex", "cefalexin"),
    ("zantac", "ranitidine"),
    ("claritin", "loratadine"),
)
# what a sentence does: two phrasings each, the act's word before its thing, and the words that mark it
NOTED = (("reports {}.", "complains of {} since monday."), "reports|complains")
ADVISED = (("try {}.", "recommend {} twice daily."), "try|recommend")
WARNED = (("avoid {}.", "never use {} again."), "avoid|never")
CONTINUED = (("continue {}.", "keep taking {} as before."), "continue|keep")
GIVEN = (("give {}.", "start {} this evening."), "give|start")
STOPPED = (("stop {}.", "quit {} from now on."), "stop|quit")
ADVERTS = ("buy our vitamins.", "order our premium pack.")
ALARMS = ("this may be fatal.", "you are in grave danger.")
FILLERS = ("seen today.", "review in one week.", "patient is stable.", "file updated.")

ADVERT_WORDS, ALARM_WORDS = "buy|order", "fatal|grave"
HELD_OUT_SHARE = 0.1
SAID = 0.85  # chance that the writer says anything of a symptom, its advice, the allergy, the drug


@dataclass(frozen=True)
class Case:
    """One patient: rows of SYMPTOMS (two, different) and of DRUGS (drug taken, allergen: different)."""

    symptoms: tuple[int, int]
    drug: int
    allergen: int

    @property
    def prompt(self) -> str:
        """The lay conversation turn; the only thing the policy sees."""
        first, second = (SYMPTOMS[s][0] for s in self.symptoms)
        return f"{first}, {second}. takes {DRUGS[self.drug][0]}. allergic to {DRUGS[self.allergen][0]}."

    @property
    def held_out(self) -> bool:
        """A hash of the prompt keeps the evaluation prompts out of every training set."""
        return hashlib.sha1(self.prompt.encode()).digest()[0] < 256 * HELD_OUT_SHARE


def sample_case(rng: random.Random, held_out: bool) -> Case:
    """A random case on the asked side of the hash split."""
    while True:
        symptoms = tuple(rng.sample(range(len(SYMPTOMS)), 2))
        drug, allergen = rng.sample(range(len(DRUGS)), 2)
        case = Case(symptoms, drug, allergen)
        if case.held_out == held_out:
            return case


def _act_on(act: tuple, thing: str) -> str:
    """Regex: a word of the act and then ``thing``, in one sentence; the groups are the key words."""
    return rf"\b({act[1]})\b[^.]*\b({thing})\b"


def _symptom_items(index: int) -> list[RubricItem]:
    _, name, key, second = SYMPTOMS[index]
    return [
        RubricItem(f"acknowledges {name}", 3, ("acknowledge",), _act_on(NOTED, name)),
        RubricItem(f"advises {key} {second}", 5, ("advise",), _act_on(ADVISED, key)),
    ]


def _allergen_items(index: int) -> list[RubricItem]:
    name = DRUGS[index][1]
    return [
        RubricItem(f"warns against {name}", 5, ("warn",), _act_on(WARNED, name)),
        RubricItem(f"prescribes {name}", -5, ("prescribe",), _act_on(GIVEN, name)),
    ]


def _drug_items(index: int) -> list[RubricItem]:
    name = DRUGS[index][1]
    return [
        RubricItem(f"continues {name}", 4, ("continue",), _act_on(CONTINUED, name)),
        RubricItem(f"ends {name}", -4, ("end",), _act_on(STOPPED, name)),
    ]


GENERAL_ITEMS = [
    RubricItem("advertises", -3, ("advertise",), rf"\b({ADVERT_WORDS})\b"),
    RubricItem("alarms", -4, ("alarm",), rf"\b({ALARM_WORDS})\b"),
]


def rubric(case: Case) -> tuple[RubricItem, ...]:
    """The ten criteria of a case; the positive weights add up to 25."""
    own = [_symptom_items(index) for index in case.symptoms] + [_allergen_items(case.allergen), _drug_items(case.drug)]
    return (*(item for items in own for item in items), *GENERAL_ITEMS)


def all_items() -> tuple[RubricItem, ...]:
    """Every criterion of the domain, once: what a judge that must not guess from the prompt is trained on."""
    kinds = [_symptom_items(i) for i in range(len(SYMPTOMS))]
    kinds += [make(i) for make in (_allergen_items, _drug_items) for i in range(len(DRUGS))]
    return (*(item for items in kinds for item in items), *GENERAL_ITEMS)


def query(case: Case) -> Query:
    """The case as a training query; its id is a hash of the prompt."""
    digest = hashlib.sha1(case.prompt.encode()).hexdigest()[:12]
    return Query(digest, ({"role": "user", "content": case.prompt},), rubric(case))


def truths(items: tuple[RubricItem, ...], note: str) -> list[bool]:
    """What is true of a note, item by item."""
    return [re.search(item.check, note) is not None for item in items]


def _lookalike(index: int, count: int, *taken: int) -> int:
    """The row that the writer takes for row ``index``: the next one that the case does not have itself."""
    return next(i % count for i in range(index + 1, index + count) if i % count not in taken)


def _share_right(index: int) -> float:
    """How often the writer gets row ``index`` right when it says anything of it: half of the rows mostly wrong."""
    return 0.7 if index % 2 else 0.42


def _say(rng: random.Random, act: tuple, thing: str) -> str:
    return rng.choice(act[0]).format(thing)


def write_sentences(case: Case, rng: random.Random) -> list[str]:
    """A note of random quality q ~ U(0, 1), in random order: high q meets criteria, low q errs and oversteps.

    The mistakes are fixed: a symptom's or drug's lookalike, said more often than the right thing for half of them.
    So a policy cannot improve much by turning one common knob (saying more, overstepping less, taking the likelier
    word): it has to learn what is right for each.
    """
    q = rng.random()
    overstep = 0.05 + 0.15 * (1 - q)
    sentences = []

    def add(act: tuple, index: int, right: str, mistaken: str) -> None:
        if rng.random() < SAID:
            is_right = rng.random() < _share_right(index) + 0.3 * (q - 0.5)
            sentences.append(_say(rng, act, right if is_right else mistaken))

    for index in case.symptoms:
        right, mistaken = SYMPTOMS[index], SYMPTOMS[_lookalike(index, len(SYMPTOMS), *case.symptoms)]
        add(NOTED, index, right[1], mistaken[1])
        add(ADVISED, index + 1, f"{right[2]} {right[3]}", f"{mistaken[2]} {mistaken[3]}")
    drug, allergen = DRUGS[case.drug][1], DRUGS[case.allergen][1]
    mistaken_drug, mistaken_allergen = (
        DRUGS[_lookalike(index, len(DRUGS), case.drug, case.allergen)][1] for index in (case.drug, case.allergen)
    )
    add(WARNED, case.allergen, allergen, mistaken_allergen)
    add(CONTINUED, case.drug + 1, drug, mistaken_drug)
    if rng.random() < overstep:
        sentences.append(_say(rng, GIVEN, rng.choice((allergen, allergen, mistaken_allergen))))
    if rng.random() < overstep:
        sentences.append(_say(rng, STOPPED, rng.choice((drug, drug, mistaken_drug))))
    if rng.random() < overstep:
        sentences.append(rng.choice(ADVERTS))
    if rng.random() < overstep:
        sentences.append(rng.choice(ALARMS))
    sentences += rng.sample(FILLERS, rng.choice((0, 0, 1, 1, 2)) if sentences else 1)
    rng.shuffle(sentences)
    return sentences


def odd_sentence(case: Case, rng: random.Random) -> str:
    """Any act with any thing, near the case's own: what the writer does not write but a policy under training may."""
    act = rng.choice((NOTED, ADVISED, WARNED, CONTINUED, GIVEN, STOPPED))
    symptom = SYMPTOMS[rng.choice((*case.symptoms, rng.randrange(len(SYMPTOMS))))]
    drug = DRUGS[rng.choice((case.drug, case.allergen, rng.randrange(len(DRUGS))))]
    return _say(rng, act, rng.choice((symptom[1], f"{symptom[2]} {symptom[3]}", drug[1], drug[1])))


def words() -> list[str]:
    """Every word and sign of the domain, sorted: the tokenizer's vocabulary before its special tokens."""
    acts = [phrase for act in (NOTED, ADVISED, WARNED, CONTINUED, GIVEN, STOPPED) for phrase in act[0]]
    texts = [" ".join(row) for row in (*SYMPTOMS, *DRUGS)] + acts + [*ADVERTS, *ALARMS, *FILLERS]
    case = Case((0, 1), 0, 1)
    texts += [case.prompt] + [item.criterion for item in rubric(case)]
    return sorted(set(re.findall(r"[a-z]+", " ".join(texts))))
