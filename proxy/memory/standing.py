"""What a user says for all later answers: instructions ("always ...", "from now on ...") and preferences.

Promises: pure; what stands is told by a sentence's grammar, not by what it is about. An instruction speaks of every
later turn (a quantifier over time, a condition on what the user will ask) and is addressed to the assistant: an
imperative, a request, "you must"; where somebody's doing is told ("I always loved him") it is a story. A preference
is the user's own: a first person with a verb of preferring or choosing. The words for that are few in any language,
and each language has a row. Nothing that is pasted (code, quoted lines) stands. A later sentence takes the place of
an earlier one about the same thing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence, Set
from itertools import pairwise
from typing import NamedTuple

from proxy.memory.models import SYSTEM_ROLES
from proxy.memory.words import SENTENCE_END, STOP_WORDS

SENTENCE_CHARS = 800  # a longer sentence stands for nothing
MOST_SENTENCES = 4  # of one message, the first ones
_HEAD_CHARS = 5  # of a word that is a cue
_KEPT_WORDS = 16_384  # whose beginnings are known
_READ_CHARS = 8_000  # of a message, half of them from its end
_HOLDING = 128  # sentences that are compared, the newest


class Standing(NamedTuple):
    """One sentence, word for word: an instruction, or else a preference."""

    text: str
    instruction: bool


class _Language(NamedTuple):
    """`cues`: in every sentence that the patterns match one of them is in it: of a language with spaces the beginning
    of a word, of one without any characters; and `part` of one of these patterns, anywhere. Both patterns read lower
    case, `instruction` from where a clause begins, `preference` anywhere in a sentence."""

    cues: frozenset[str]
    spaced: bool
    part: re.Pattern[str]
    instruction: re.Pattern[str]
    preference: re.Pattern[str]


def _spaced(
    *, always: str, later: str, please: str, opening: str, must: str, told: str, subjects: str, prefers: str, cues: str,
    past: str = "(?!)", objects: str = "", keep: str = "(?!)", each: str = "(?!)",
) -> _Language:  # fmt: skip
    """A language with spaces between its words.

    `always`: quantifiers over time; `later`: those over the time to come, and conditions on what is asked, which may
    stand at the end, too; `please`, `opening`: what may stand before an imperative; `must`: the assistant as a
    subject, and that it has to; `told`: what no imperative begins with; `subjects`: those of them that make a story
    of a sentence anywhere in it; `past`: endings of verbs that tell; `objects`: pronouns between an imperative and its adverb, where that comes second ("": it does
    not); `keep`: what asks by itself to be kept in mind; `each`: conditions that hold again and again, for an
    imperative behind a comma.
    """
    begin = rf"(?:(?:{please}|{opening})[\s,]+)*"
    verb = rf"(?!(?:{told})\b)(?!\w+(?:{past})\b)[^\W\d_][\w’'-]*"
    quantified = rf"(?:{always}|{later})"
    forms = [
        rf"{begin}{quantified},?\s+{begin}{verb}",
        rf"{begin}(?:{must})\s+(?:\w+\s+){{0,2}}?{quantified}\b",
        rf"{begin}(?:{please})[\s,]+(?:\w+\s+){{0,2}}?{quantified}\b",
        rf"(?!.*\?)(?=.*\b(?:{later})\b){begin}{verb}(?:(?!\b(?:{subjects})\b)[^.!?])*\b(?:{later})\b",
        rf"{begin}(?:{keep})\b",
        rf"{begin}(?:{each})\b[^,.!?]+,\s*{begin}{verb}",
    ]
    if objects:
        forms.append(rf"{begin}{verb}(?:[\s-](?:{objects}))*\s+(?:{always})\b")
    heads = frozenset(cue[:_HEAD_CHARS] for cue in cues.split())
    part = re.compile(rf"\b(?:{always}|{later}|{keep}|{each}|{prefers})")
    return _Language(heads, True, part, re.compile("|".join(forms)), re.compile(rf"\b(?:{prefers})"))


def _unspaced(cues: str, instruction: str, preference: str) -> _Language:
    return _Language(frozenset(cues.split("|")), False, re.compile(cues), re.compile(instruction), re.compile(preference))


_ENGLISH = _spaced(
    always="always|never|ever",
    later=r"from now on|from here on|from this point on|going forward|henceforth|in (?:the )?future|at all times|by default"
    r"|until further notice|no longer|any ?more(?=[.!]?$)|(?:when|whenever|if|every time|each time) i (?:ask|say|tell|mention"
    r"|request|send|type|want)|when you (?:answer|reply|respond|write)|(?:whenever|every time|each time) you"
    r"|(?:in|for|with) (?:all|every|each)(?: of)?(?: your)? (?:answers?|repl(?:y|ies)|responses?)"
    r"|(?:in|for) (?:future|all) (?:answers|replies|responses|messages)|for the rest of (?:this|our|the) (?:conversation|chat|session)"
    r"|throughout(?=[.!]?$)",
    please="please|kindly",
    opening=r"and|so|also|but|ok|okay|then|now|just|actually|instead|do not|don['’]t|make sure(?: that)?(?: to| you)?|be sure to"
    r"|remember to|remember,|i(?:['’]d| would)? (?:want|like|need|expect) you to|could you|can you",
    must=r"(?:you|your \w+) (?:must|should|shall|have to|need to|ought to|are to)",
    told="i|i['’]\\w+|me|he|him|she|it|we|us|they|them|you|this|that|there|these|those|who|what|which|my|his|her|our|their|the"
    "|a|an|is|are|was|were|am|been|had|has|have|did|does|would|could|will|in|on|at|up|so|too|very|more|as|for|of|to|with|not"
    "|thought|knew|felt|got|went|said|saw|came|heard|seen|met|know|mind|here|such|quite|really|just|like|enough|before|again"
    "|yes|no|how|why|where|if|when",
    past="ed|ing|n['’]t|es|[^sui]s",
    keep="remember (?:that|to|not)|keep in mind|(?:all|each|every one) (?:of )?your (?:answers|replies|responses|messages)",
    each="(?:whenever|every time|each time) (?:i|we|the|there)",
    subjects=r"i|i['’]\w+|he|she|we|we['’]\w+|they|they['’]\w+|it['’]s|was|were|is|are|has|had|will|would|am|been|did|does",
    prefers=r"i(?:['’]d| would)?(?: \w+){0,2}? (?:prefer|favou?r|rather)\b|(?:my|a) (?:\w+ )?preferences?\b|call me\b|my name is\b"
    r"|i(?:['’]m| am) allergic\b|i(?:['’]ve| have)?(?: \w+)? (?:chose|chosen|opted|decided|settled on)\b|i aim\b"
    r"|i (?:hate|(?:don['’]t|do not) (?:like|eat|drink)|only (?:want|use|eat|drink|need))\b"
    r"|i(?:['’]m| am)(?: an?)? (?:vegan|vegetarian|\w+ intolerant)\b"
    r"|i(?:['’]m| am|['’]d)?(?: \w+)? (?:trying|want|need|like|hope|hoping) to (?:keep|avoid|stick)\b",
    cues="always never ever whenever every each now here point forward henceforth future times default notice longer "
    "anymore more ask say tell mention request send type want answer answers reply replies respond response messages "
    "rest throughout remember mind prefer rather favour favor call name allergic chose chosen opted decided settled "
    "aim keep avoid stick hate like eat drink only vegan vegetarian intolerant",
)  # fmt: skip

_GERMAN = _spaced(
    always="immer|stets|nie|niemals|jederzeit|jedes mal",
    later=r"ab (?:jetzt|sofort|nun)|von (?:jetzt|nun) an|künftig|zukünftig|in zukunft|fortan|nicht mehr|standardmäßig"
    r"|(?:wenn|sobald) ich (?:\w+ ){0,4}?(?:frage|bitte|schreibe|sage)|in (?:allen|jeder|deinen) antwort(?:en)?",
    please="bitte",
    opening="und|also|aber|ok|okay|dann|auch|nun|jetzt|achte darauf|stell sicher",
    must=r"(?:du|sie) (?:sollst|solltest|musst|sollen|sollten|müssen|darfst|dürfen)|dass (?:du|sie)"
    r"|ich (?:möchte|will|hätte gern), dass (?:du|sie)",
    told="ich|er|es|wir|ihr|das|der|die|den|dem|ein|eine|einen|mein\\w*|sein\\w*|unser\\w*|man|war|waren|ist|sind|bin|hat|habe"
    "|haben|hatte|wurde|in|im|am|an|auf|für|mit|von|zu|wenn|als|so|noch|wieder|schon|nur|sehr|mehr|wer|was|wie|wo|warum|hier"
    "|da|dort|gut",
    objects="mir|uns|mich|sie|du|dabei|doch|mal|bitte|auch",
    keep="merk dir|denk daran|denke daran|vergiss nicht",
    subjects=r"ich|er|es|wir|war|waren|ist|sind|hat|habe|haben|hatte|wurde|wird|werden",
    each="immer wenn ich|jedes mal,? wenn|sooft ich|sobald ich",
    prefers=r"ich bevorzuge|ich (?:\w+ ){0,4}?(?:lieber|am liebsten)|ich ziehe .{1,40} vor\b|mir (?:ist|wäre|sind) .{0,30}lieber"
    r"|meine (?:präferenz|vorliebe)|nenn(?:en sie)? mich|ich heiße|mein name ist|ich bin allergisch|ich habe mich (?:\w+ ){0,6}?"
    r"entschieden",
    cues="immer stets nie niemals jederzeit jedes jetzt sofort nun künftig zukunft fortan mehr standardmäßig frage bitte "
    "schreibe sage antwort antworten merk denk denke vergiss bevorzuge lieber liebsten ziehe präferenz vorliebe nenn "
    "nennen heiße name allergisch entschieden sooft sobald",
)  # fmt: skip

_FRENCH = _spaced(
    always="toujours|jamais|systématiquement|(?:à )?chaque fois",
    later=r"désormais|dorénavant|à partir de maintenant|à l['’]avenir|par défaut|(?:quand|lorsque|si|chaque fois que) je "
    r"(?:te |vous )?(?:demande|dis|pose|parle|mentionne)|dans (?:toutes (?:tes|vos)|chaque) réponses?",
    please=r"s['’]il (?:te|vous) pla[iî]t|stp|svp|merci de|veuillez",
    opening="et|donc|alors|aussi|mais|ok|pense à|pensez à|assure-toi de|assurez-vous de|ne|ne pas",
    must="(?:tu|vous) (?:dois|devez|devrais|devriez)|que (?:tu|vous)",
    told=r"je|j['’]\w+|il|elle|on|nous|ils|elles|c['’]\w+|ce|cela|ça|le|la|les|un|une|des|mon|ma|mes|son|sa|ses|leur|notre|est"
    r"|était|a|ai|avait|sont|été|suis|dans|sur|à|de|du|pour|par|avec|en|très|plus|pas|aussi|si|qui|que|quoi|où|comment|pourquoi"
    r"|y|eu|vu|fait|l['’]\w+|d['’]\w+|tu",
    objects="moi|nous|toi|vous|le|la|les|lui|leur",
    keep="souviens-toi|souvenez-vous|rappelle-toi|n['’]oublie pas|n['’]oubliez pas",
    subjects=r"je|j['’]\w+|il|elle|on|nous|ils|elles|est|était|ai|avait|sont|c['’]\w+",
    each="(?:à )?chaque fois que|dès que je",
    prefers=r"je préf[èé]r|j['’]aime(?:rais)? mieux|mes? préférences?|ma préférence|appelle-moi|appelez-moi|je m['’]appelle"
    r"|mon (?:nom|prénom) est|je suis allergique|j['’]ai (?:choisi|décidé|opté)",
    cues="toujours jamais systématiquement chaque désormais dorénavant maintenant avenir défaut demande dis pose parle "
    "mentionne toutes préfère préférerais mieux préférence appelle appelez nom prénom allergique choisi décidé opté "
    "souviens souvenez rappelle oublie oubliez dès",
)  # fmt: skip

# These three share words.
_ROMANCE = (
    r"yo|él|ella|nosotros|ellos|ellas|me|mi|mis|su|sus|nos|el|la|los|las|un|una|es|era|fue|fui|soy|son|estoy|está"
    r"|estaba|he|ha|han|había|tengo|tenía|hay|en|con|de|a|para|por|que|muy|más|así|lo|se|le|quise|quiero|supe|vi"
    r"|hice|digo|creo|tuve|eu|ele|ela|nós|eles|elas|meu|minha|seu|sua|o|os|as|um|uma|é|foi|sou|são|estou|tenho"
    r"|tinha|há|em|com|muito|mais|assim|lhe|quis|quero|fiz|acho|no|na|do|da|tive|tem|io|lui|lei|noi|loro|mio|mia"
    r"|miei|suo|ci|il|i|gli|è|sono|ho|hanno|abbiamo|avevo|aveva|stato|in|di|per|che|molto|più|così|si|nel|nella|al"
    r"|alla|visto|l['’]\w+|penso|credo"
)
_SPANISH = _spaced(
    always="siempre|nunca|jamás|cada vez",
    later=r"a partir de ahora|de ahora en adelante|desde ahora|en (?:el|lo) (?:futuro|sucesivo)|por defecto"
    r"|(?:cuando|si|cada vez que) te (?:pregunte|pregunto|pida|pido|diga|digo)|en (?:todas tus|cada) respuestas?",
    please="por favor",
    opening="y|así que|también|pero|ok|vale|entonces|no|asegúrate de|procura",
    must="(?:tú |usted )?(?:debes|deberías|debe|tienes que|tiene que)|(?:quiero|necesito|gustaría|prefiero) que",
    told=_ROMANCE,
    past="é|í|ó|aba|ía|aron|ieron|amos|emos|imos|ado|ido|ei|ou|aram|eram|iram",
    objects="me|nos|le|lo|la|usted",
    keep="recuerda que|no olvides|ten en cuenta",
    subjects=r"yo|él|ella|nosotros|ellos|es|era|fue|fui|soy|son|estoy|está|he|ha|había|tengo|voy|vamos",
    each="cada vez que|siempre que",
    prefers=r"prefiero|preferiría|mis? preferencias?|llámame|llámeme|me llamo|mi nombre es|soy alérgic|(?:elegí|decidí|opté)\b"
    r"|he (?:elegido|decidido|optado)",
    cues="siempre nunca jamás cada ahora futuro sucesivo defecto pregunte pregunto pida pido diga digo todas recuerda "
    "olvides cuenta prefiero preferiría preferencia preferencias llámame llámeme llamo nombre alérgico alérgica elegí "
    "elegido decidí decidido opté optado",
)  # fmt: skip

_PORTUGUESE = _spaced(
    always="sempre|nunca|jamais|toda vez|cada vez",
    later=r"a partir de agora|de agora em diante|daqui (?:em diante|para (?:a )?frente)|no futuro|por padrão"
    r"|(?:quando|se|sempre que) eu (?:te |lhe )?(?:perguntar|pedir|disser|escrever)|em (?:todas as suas|cada) respostas?",
    please="por favor",
    opening="e|então|também|mas|ok|não|certifique-se de|procure",
    must="(?:você|tu) (?:deve|deves|precisa|tem que|deveria)|(?:quero|preciso|gostaria|prefiro) que(?: você)?",
    told=_ROMANCE,
    past="ei|ou|ava|aram|eram|iram|amos|emos|imos|ado|ido|é|í|ó|aba|ía|aron|ieron|ato|uto|ito|avo|eva|evo|iamo",
    objects="me|nos|lhe|o|a",
    keep="lembre-se|lembra-te|não esqueça|não se esqueça",
    subjects=r"eu|ele|ela|nós|eles|é|era|foi|fui|sou|são|estou|está|tenho|vou|vamos",
    each="toda vez que|sempre que",
    prefers=r"prefiro|preferiria|minhas? preferências?|me chame|chame-me|me chamo|meu nome é|sou alérgic"
    r"|(?:escolhi|decidi|optei)\b",
    cues="sempre nunca jamais toda todas cada agora daqui futuro padrão perguntar pedir disser escrever lembre lembra "
    "esqueça prefiro preferiria preferência preferências chame chamo nome alérgico alérgica escolhi decidi optei",
)  # fmt: skip

_ITALIAN = _spaced(
    always="sempre|mai|ogni volta",
    later=r"d['’]ora in (?:poi|avanti)|da (?:ora|adesso) in poi|in futuro|per impostazione predefinita"
    r"|(?:quando|se|ogni volta che) (?:ti |le )?(?:chiedo|dico|scrivo|domando)|in (?:tutte le tue|ogni) rispost[ae]",
    please="per favore|per piacere|per cortesia",
    opening="e|quindi|anche|ma|ok|allora|non|assicurati di|cerca di",
    must="(?:tu |lei )?(?:devi|deve|dovresti|dovrebbe)|(?:voglio|vorrei|preferisco) che(?: tu)?",
    told=_ROMANCE,
    past="ato|uto|ito|avo|eva|ava|evo|iamo|ei|ou|aram|eram|iram|amos|emos",
    objects="mi|ci|gli|le|lo|la",
    keep="ricorda che|ricordati|non dimenticare|tieni presente",
    subjects=r"io|lui|lei|noi|loro|è|era|sono|ho|ha|abbiamo|avevo",
    each="ogni volta che",
    prefers=r"preferisco|preferirei|(?:la mia|le mie) preferenz[ae]|chiamami|mi chiami|mi chiamo|il mio nome è|sono allergic"
    r"|ho (?:scelto|deciso|optato)",
    cues="sempre mai ogni ora adesso futuro predefinita chiedo dico scrivo domando tutte ricorda ricordati dimenticare "
    "presente preferisco preferirei preferenza preferenze chiamami chiami chiamo nome allergico allergica scelto "
    "deciso optato",
)  # fmt: skip

_DUTCH = _spaced(
    always="altijd|nooit|steeds|telkens",
    later=r"vanaf nu|voortaan|in het vervolg|in de toekomst|standaard|niet meer"
    r"|(?:als|wanneer) ik (?:\w+ ){0,4}?(?:vraag|zeg|schrijf|stuur)|in (?:al je|elk|elke) antwoord(?:en)?",
    please="alsjeblieft|alstublieft|graag",
    opening="en|dus|ook|maar|ok|oké|dan|denk eraan",
    must="(?:je|jij|u) (?:moet|dient|zou)|dat (?:je|jij|u)",
    told="ik|hij|zij|ze|het|we|wij|dat|dit|de|een|mijn|zijn|haar|ons|onze|hun|is|was|waren|ben|heb|heeft|had|hebben|in|op|aan"
    "|voor|met|van|te|als|zo|nog|weer|al|heel|meer|wie|wat|hoe|waar|waarom|er|geweest|goed",
    objects="me|mij|ons|u|je|ook",
    keep="onthoud|vergeet niet",
    subjects=r"ik|hij|zij|ze|we|wij|is|was|waren|ben|heb|heeft|had|zal",
    each="telkens als|elke keer dat|steeds als",
    prefers=r"ik (?:\w+ ){0,4}?(?:liever|verkies|prefereer)|ik geef de voorkeur|mijn voorkeur|noem (?:me|mij)|ik heet|mijn naam is"
    r"|ik ben allergisch|ik heb (?:\w+ ){0,6}?(?:gekozen|besloten)",
    cues="altijd nooit steeds telkens nu voortaan vervolg toekomst standaard meer vraag zeg schrijf stuur elk elke "
    "antwoord antwoorden onthoud vergeet liever verkies prefereer voorkeur noem heet naam allergisch gekozen besloten",
)  # fmt: skip

_RUSSIAN = _spaced(
    always="всегда|никогда|каждый раз|постоянно",
    later=r"отныне|впредь|с этого (?:момента|дня)|в дальнейшем|в будущем|по умолчанию|больше не"
    r"|(?:когда|если) я (?:тебя |вас )?(?:спрошу|спрашиваю|прошу|попрошу|скажу|пишу)|в (?:каждом|любом) ответе|во всех ответах",
    please="пожалуйста|прошу",
    opening="и|а|но|также|тогда|ок|не|старайся",
    must="(?:ты|вы) (?:должен|должна|должны)|чтобы (?:ты|вы)|(?:тебе|вам) (?:нужно|следует)",
    told="я|он|она|оно|мы|они|меня|мне|мой|моя|мои|его|её|ее|их|это|этот|был|была|было|были|есть|нет|в|на|с|к|у|по|для|о|от|из|за"
    "|что|как|кто|где|когда|если|очень|так|там|тут|ещё|еще|уже|можно",
    past="л|ла|ло|лся|лась|лись|али|или|ели|ет|ит|ют|ят|ут|ешь|ишь|ем|им|ю|у",
    objects="мне|нам",
    keep="запомни|запомните|помни|помните|не забывай|не забывайте|имей в виду",
    subjects=r"я|он|она|мы|они|был|была|было|были",
    each="каждый раз,? когда",
    prefers=r"я предпочита|предпочитаю|я бы предпоч|мне больше нравится|мо[иёе] предпочтени|зови(?:те)? меня|называй(?:те)? меня"
    r"|меня зовут|у меня аллерги|я (?:выбрал|решил|предпоч)",
    cues="всегда никогда каждый постоянно отныне впредь этого дальнейшем будущем умолчанию больше спрошу спрашиваю прошу "
    "попрошу скажу пишу каждом любом всех запомни запомните помни помните забывай забывайте виду предпочитаю "
    "предпочёл нравится предпочтения зови зовите называй называйте зовут аллергия выбрал выбрала решил решила",
)  # fmt: skip

_ARABIC = _spaced(
    always="دائما|دائمًا|دائماً|أبدا|أبدًا|أبداً|كلما|في كل مرة",
    later="من الآن فصاعد(?:ا|ًا|اً)|مستقبل(?:ا|ًا|اً)|في المستقبل|بعد الآن|عندما (?:أسأل|أسألك|أطلب)",
    please="من فضلك|رجاء|رجاءً|الرجاء|أرجو|أرجوك",
    opening="لا|ثم|أيضا|أيضًا",
    must="يجب (?:أن|عليك أن)|عليك أن|أريدك أن|أريد منك أن",
    told="أنا|هو|هي|نحن|هم|كان|كانت|كنت|هذا|هذه|ذلك|في|من|على|إلى|ما|قد|لقد|أحب",
    objects="لي|لنا|علي",
    keep="تذكر أن|لا تنس",
    subjects=r"أنا|هو|هي|نحن|هم|كان|كانت|كنت",
    each="كلما",
    prefers="أنا أفض|أفضّل|أفضل (?:أن|استخدام|عدم)|تفضيلاتي|نادني|ناديني|اسمي|(?:لدي|عندي) حساسية|اخترت|قررت",
    cues="دائما دائمًا دائماً أبدا أبدًا أبداً كلما مرة الآن مستقبل المستقبل مستقبلا مستقبلاً عندما تذكر تنس أفضل أفضّل "
    "أفض تفضيلاتي نادني ناديني اسمي حساسية اخترت قررت",
)  # fmt: skip

_ZH_LATER = (
    "以[后後]|今[后後]|[从從]现在(?:起|开始)|從現在(?:起|開始)|[从從]今以[后後]|往[后後]|[总總]是|始[终終]|永[远遠]|[务務]必|一律|默[认認]|不要再|[别別]再"
)
_CHINESE = _unspaced(
    "以后|以後|今后|今後|现在|現在|往后|往後|是|始终|始終|永远|永遠|务必|務必|一律|默认|默認|再|每|当我|當我|偏好|倾向|傾向|宁|寧|喜|愿意|願意|选择|選擇|决定|決定|叫|名字|过敏|過敏|记住|記住",
    rf"(?:[请請]你?|麻[烦煩]你?|那|好的?|嗯|也|[您你](?:要|得|应该|應該|必须|必須)|[,，\s])*(?:(?:{_ZH_LATER})(?![我他她它]|不?[爱愛]|很)"
    rf"|每次(?:我[问問说說]|[请請回])|每[当當]我[问問说說]|[当當]我[问問说說]|[记記]住)"
    rf"|[请請][^。！？]{{0,20}}?(?:{_ZH_LATER}|每次|一直)",
    r"我(?:[个個]人|更|比[较較]|[还還]是|最|一般|通常|[会會])*(?:偏好|[倾傾]向|[宁寧][愿願可]|(?:更|比[较較])喜[欢歡]|更[愿願]意|[选選][择擇]了|[决決]定)"
    r"|我的偏好|(?:^|[请請，,就])叫我|我叫|我的名字|我[对對][^，。]{1,10}[过過]敏",
)

_JAPANESE = _unspaced(
    "常に|必ず|いつも|今後|これから|以後|以降|毎回|絶対|決して|二度と|好|希望|私の|呼んで|アレルギー|決めました|選びました|覚えて",
    r"(?:(?!私[はが]|僕[はが]|俺[はが]|彼)[^。！？])*?(?:常に|必ず|いつも|今後|これから|以後|以降|毎回|絶対に?|決して|二度と)(?:(?!私[はが]|僕[はが]|俺[はが])[^。！？])*?"
    r"(?:ください|下さい|くれ|ほしい|欲しい|お願い(?:します)?|なさい|こと|しろ|して|ないで|てね|るな)[。！!\s]*$|[^。]*覚えて(?:おいて)?(?:ください|ね)?[。！!\s]*$",
    r"(?:方|ほう)が好き|の方を好|を好みます|が好みです|を希望します|私の(?:好み|名前)は|と呼んで|アレルギー|に決めました|を選びました",
)

_KOREAN = _unspaced(
    "항상|언제나|늘|절대|앞으로|부터|매번|더 이상|때|선호|좋|이름|불러|알레르기|하기로|기억해",
    r"(?:(?!나는|저는|내가|제가|난 )[^.!?])*?(?:항상|언제나|늘|절대|앞으로|이제부터|지금부터|다음부터|매번|더 이상|(?:물어볼|질문할|물으면) ?때?)"
    r"(?:(?!나는|저는|내가|제가)[^.!?])*?(?:세요|십시오|줘요?|주라|해라|하라|마라|지 ?마|마세요|바랍니다|부탁(?:해요?|드립니다|드려요)?|말 ?것|할 ?것)[.!\s]*$"
    r"|[^.!?]*기억해 ?(?:줘|주세요|둬)?[.!\s]*$",
    r"선호(?:해|합|하는)|더 좋아(?:해|합)|제 이름은|내 이름은|(?:라고|으로) 불러|알레르기|하기로 (?:했|결정)",
)

LANGUAGES = (
    _ENGLISH, _GERMAN, _FRENCH, _SPANISH, _PORTUGUESE, _ITALIAN, _DUTCH, _RUSSIAN, _CHINESE, _JAPANESE, _KOREAN, _ARABIC,
)  # fmt: skip

# -- of a message

_FENCE = re.compile(r"```.*?(?:```|\Z)|~~~.*?(?:~~~|\Z)", re.DOTALL)
_SENTENCE_END = re.compile(SENTENCE_END)
# What may stand in front of an instruction: a list's mark, a condition, an opening; a speaker, anything before a dash.
_OPENING = re.compile(
    r"[\s*#\d.)(\"'“„«‹「-]+"
    r"|(?:when|whenever|if|for|as|since|because|wenn|quand|si|cuando|quando|se|als|wanneer|когда|если)\b[^,]{1,160},\s*"
)
_CLAUSE = re.compile(r"[:;—–：；]\s*|\s-\s")
_QUOTED = (">", "|")
_LETTERS = re.compile(r"[^\W\d_]+")
_APART = {code: chr(code) if chr(code).isalpha() else " " for code in range(128)}  # the same, of plain ASCII
_CUES = frozenset[str]().union(*(language.cues for language in LANGUAGES if language.spaced))


def standing_in(role: str, text: str) -> list[Standing]:
    """The sentences of a message that stand, in their order; a system message's are instructions."""
    if role != "user" and role not in SYSTEM_ROLES:
        return []
    if len(text) > _READ_CHARS:
        text = f"{text[: _READ_CHARS // 2]}\n{text[-_READ_CHARS // 2 :]}"
    cues, found, plain = _cues_in(whole := text.lower()), list[Standing](), text.isascii()
    languages = _written_in(whole, cues) if cues or not plain else []
    for sentence in _sentences(text) if languages else ():
        low = sentence.lower()
        if plain and not any(map(low.__contains__, cues)):
            continue
        here = [language for language in languages if language.part.search(low)]
        starts = _clauses(low) if here else ()
        if any(language.instruction.match(low, start) for language in here for start in starts):
            found.append(Standing(sentence, True))
        elif role == "user" and any(language.preference.search(low) for language in here):
            found.append(Standing(sentence, False))
    return found[:MOST_SENTENCES]


class _Heads(dict[str, str]):
    """Word -> how it begins, where that is a cue."""

    def __missing__(self, word: str) -> str:
        if len(self) >= _KEPT_WORDS:
            self.clear()
        self[word] = head = word[:_HEAD_CHARS] if word[:_HEAD_CHARS] in _CUES else ""
        return head


_heads = _Heads()


def _cues_in(low: str) -> set[str]:
    """Those of the languages with spaces."""
    words = low.translate(_APART).split() if low.isascii() else _LETTERS.findall(low)
    return set(map(_heads.__getitem__, words)) - {""}


def _written_in(low: str, cues: Set[str]) -> list[_Language]:
    """The languages whose cues are in it: told for far less than the patterns cost."""
    wide = not low.isascii()
    return [
        language
        for language in LANGUAGES
        if (not cues.isdisjoint(language.cues) if language.spaced else wide and any(cue in low for cue in language.cues))
    ]


def _sentences(text: str) -> Iterator[str]:
    """As they are written, with their marks, but for what is pasted."""
    if "```" in text or "~~~" in text:
        text = _FENCE.sub("\n", text)
    for line in text.split("\n"):
        start = 0
        for end in (*[match.end() for match in _SENTENCE_END.finditer(line)], len(line)):
            sentence = line[start:end].strip()
            start = end
            if 0 < len(sentence) <= SENTENCE_CHARS and not sentence.startswith(_QUOTED):
                yield sentence


def _clauses(low: str) -> list[int]:
    """Where its clauses begin."""
    opening = _OPENING.match(low)
    starts = [0, opening.end()] if opening else [0]
    return [*starts, *(match.end() for match in _CLAUSE.finditer(low, starts[-1]))]


# -- one that takes another's place

_WORD = re.compile(r"[぀-ヿ㐀-鿿가-힣]|[^\W_]+(?:[./-][^\W_]+)*")
_NO_SPACES = re.compile(r"[぀-ヿ㐀-鿿가-힣]")
_CONDITION = re.compile(
    r"\b(?:when(?:ever)?|if|every time|each time|wenn|sobald|quand|lorsque|si|cuando|quando|se|als|wanneer|когда|если|عندما)\s.*"
    r"|(?:when|quand|wenn|[每当當])[^,，]*[,，]"
)
_CHANGE = re.compile(  # it was otherwise before
    r"from (?:now|here) on|going forward|no longer|any ?more|instead|actually|ab (?:jetzt|sofort)|von (?:jetzt|nun) an|nicht mehr"
    r"|stattdessen|doch lieber|désormais|dorénavant|à partir de|plutôt|finalement|a partir de a|de a(?:hora|gora) em?n? |ya no"
    r"|en (?:su|lugar)|em vez|d['’]ora in|da (?:ora|adesso) in|non più|invece|vanaf nu|voortaan|niet meer|in plaats|отныне|впредь"
    r"|с этого|больше не|вместо|以[后後]|[从從]现在|[从從]現在|改|今後|これから|代わり|앞으로|부터|대신|من الآن|بعد الآن|بدل"
)
_ADDS = re.compile(r"\b(?:also|too|as well|includ\w+|add|mention)\b|auch|aussi|ajoute|también|añad|também|anche|ook|также|добав|也|も|도 ")
_SLOT = frozenset("in with as by to at auf mit als en avec con em com op met на в с по بال".split())
_SLOT_WORDS = 3
_SIGNS = re.compile(r"[总總]是?|始[终終]|永[远遠]|[务務]必|一律|默[认認]|每次|都|[请請]|常に|必ず|いつも|毎回|항상|언제나|절대|늘|매번")
_COMMON = STOP_WORDS | frozenset("always never ever every each time please now forward future default ask".split())


class _Subject(NamedTuple):
    words: tuple[str, ...]
    about: frozenset[str]  # what is asked for
    condition: frozenset[str]  # and when
    changes: bool
    adds: bool


def holding(said: Sequence[Sequence[Standing]]) -> list[list[Standing]]:
    """Of the sentences that stand in each of these messages, the oldest first, those whose place none of a later
    message takes."""
    left, later = _HOLDING, list[_Subject]()
    out: list[list[Standing]] = []
    for sentences in reversed(said):
        subjects = [_subject(sentence.text) for sentence in sentences]
        holds = [s for s, own in zip(sentences, subjects, strict=True) if not any(_replaces(one, own) for one in later)]
        left -= len(holds)
        out.append(holds if left >= 0 else [])
        later += subjects
    return out[::-1]


def _subject(text: str) -> _Subject:
    low = text.lower()
    condition = _CONDITION.search(low)
    main = low if condition is None else f"{low[: condition.start()]} {low[condition.end() :]}"
    when = frozenset(_content(condition.group(0))) if condition is not None else frozenset()
    return _Subject(tuple(_WORD.findall(low)), frozenset(_content(main)), when, bool(_CHANGE.search(low)), bool(_ADDS.search(low)))


def _content(low: str) -> Iterator[str]:
    """What tells one subject from another: words by their beginnings, pairs of characters where no space parts
    words; not what quantifies."""
    words = [word for word in _WORD.findall(_SIGNS.sub(" ", _CHANGE.sub(" ", low))) if word not in _COMMON]
    yield from (word[:6] for word in words if not _NO_SPACES.match(word))
    signs = [word for word in words if _NO_SPACES.match(word)]
    yield from map("".join, pairwise(signs))


def _replaces(later: _Subject, earlier: _Subject) -> bool:
    """They are about the same thing: the same words for the same case, or all but a last slot that takes one
    value only; of what says that it was otherwise, a part is enough."""
    if (later.condition or earlier.condition) and not _alike(later.condition, earlier.condition, 0.5):
        return False
    if _alike(later.about, earlier.about, 0.5) or _same_slot(later.words, earlier.words):
        return True
    return later.changes and not later.adds and _alike(later.about, earlier.about, 1 / 3)


def _alike(one: frozenset[str], other: frozenset[str], share: float) -> bool:
    return bool(one & other) and len(one & other) >= share * len(one | other)


def _same_slot(one: Sequence[str], other: Sequence[str]) -> bool:
    """They differ in a few words behind a preposition."""
    least = min(len(one), len(other))
    first = next((i for i in range(least) if one[i] != other[i]), least)
    last = next((i for i in range(least - first) if one[-1 - i] != other[-1 - i]), least - first)
    spans = len(one) - first - last, len(other) - first - last
    return first > 1 and one[first - 1] in _SLOT and min(spans) > 0 and max(spans) <= _SLOT_WORDS
