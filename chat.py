"""
Talk to a CWIC model and see where its compute goes.

    python chat.py                                      # a conversation; /help lists the commands
    python chat.py --prompt "Why is the sky blue?"      # one reply
    python chat.py --json < prompts.txt                 # a reply to each line, as JSON, for scripts

Of a file or pipe, each line is answered on its own, without what was said before, and commands are text like
any other. render.as_json() says what the JSON holds.

The model is your own, if there is one in out/, else the shipped 3x adapter, which makes
SmolLM2-135M-Instruct sparse. --ckpt takes everything that weights.py can load. --dense uses every weight; for
an adapter it loads the dense model underneath. Each token's background shows how many weights were used to
process it; NO_COLOR=1 turns colours off. If stdout is not a terminal, it gets only the replies, and remarks
go to stderr.

A model with a chat template answers. Any other continues the text: what you type is added on a new line. If
it was trained on dialogues, give --turn_template 'User: {prompt}\\nAssistant:' --stop '\\nUser:';
data/text/prepare.py says how to train one.

Exit codes: 0; 1 no usable model or a full disk; 2 a bad option or prompt; 130 interrupted; 141 stdout closed.

Here are the options, the commands and the pipes; conversation.py holds the conversation, render.py its looks.
Not here: a mouse, a full screen, switching models while it runs.
"""

import os
import shutil
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path

import render
from options import SAMPLING, fail, option, parse_options, printable, read_value

try:
    import readline
except ImportError:     # Windows has none: no editing there, but typing works
    readline = None

OWN = ('out/best.safetensors', 'out/last.safetensors')          # the first that exists
ADAPTER = str(Path(__file__).resolve().parent / 'adapters' / 'smollm2.safetensors')
DTYPES = ('auto', 'f32', 'bf16', 'int8')
NEED_A_REPLY = ('retry', 'dense', 'layers', 'tokens', 'save', 'plot')
SETTABLE = (*SAMPLING, 'seed', 'max_tokens', 'stop', 'system', 'turn_template')
COMMANDS = {
    'help': 'show this list',
    'reset': 'clear the conversation, and start again from the seed',
    'retry': 'reply to the last prompt again',
    'set': 'list the options that can change; /set KEY VALUE changes one',
    'dense': 'answer the last prompt with every weight, and compare',
    'layers': 'show how much of each matrix the last reply used',
    'tokens': 'show the last prompt in its colours, and the reply as a table',
    'save': 'save the conversation as a page or a picture: FILE.html, FILE.png',
    'plot': 'draw the compute of the last reply: /plot FILE.png',
    'quit': 'leave; Ctrl-D does too'}


@dataclass
class ChatConfig:
    about = 'Talks with a CWIC model; the colour behind each token shows its compute.'
    prompt: str = option(None, 'reply to this and end; else converse, or reply to each line of stdin')
    ckpt: str = option('', 'a checkpoint, an adapter, a .gguf file, a folder, or the name of a dense model '
                           f'such as smollm2; else {" or ".join(OWN)}, or the shipped adapter')
    dense: bool = option(False, "use every weight; of an adapter, load the dense model underneath")
    json: bool = option(False, 'print one JSON object for each reply')
    dtype: str = option('auto', 'of the weights: f32, bf16, int8, or auto, which is int8 for large models')
    threads: int = option(None, 'of the kernel; else one for each core, up to 8', at_least=1, at_most=1024)
    temperature: float = option(SAMPLING['temperature'], '0 always takes the likeliest token',
                                at_least=0, at_most=1000)
    top_k: int = option(SAMPLING['top_k'], 'sample among this many likeliest tokens; 0: all', at_least=0)
    top_p: float = option(SAMPLING['top_p'], 'sample among the likeliest, up to this total probability',
                          at_least=0, at_most=1)
    min_p: float = option(SAMPLING['min_p'], "sample among tokens with at least this share of the likeliest "
                          "token's probability", at_least=0, at_most=1)
    repeat_penalty: float = option(SAMPLING['repeat_penalty'], 'divides the logits of the last 64 tokens of '
                                   'the reply if positive, else multiplies them; 1: off',
                                   at_least=1, at_most=10)
    seed: int = option(1, 'of sampling: same seed, same text, with the same kernel and number of threads',
                       at_least=0)
    max_tokens: int = option(300, 'longest reply', at_least=1)
    system: str = option('', "the system prompt; else the chat template's own")
    stop: str = option('', 'text that ends a reply, not shown; separate several by |; takes \\n, \\t')
    turn_template: str = option('', 'replaces the chat template; {prompt} is what you type; takes \\n')

    def __post_init__(self):
        if self.dtype not in DTYPES:
            raise ValueError(f'dtype must be one of {", ".join(DTYPES)}')
        if self.turn_template and '{prompt}' not in self.turn_template:
            raise ValueError('turn_template must hold {prompt}')


class Chat:
    """
    Prints replies: in colours on a terminal, as plain text, or as JSON. A typed line that begins with / is
    one of COMMANDS, carried out by the method command_... .
    """

    def __init__(self, conversation, palette, terminal, as_json):
        self.conversation, self.palette = conversation, palette
        self.terminal, self.as_json = terminal, as_json
        self.painter = render.Painter(sys.stdout, palette, lambda: shutil.get_terminal_size().columns)
        self.typing = False     # whether prompts are typed at the terminal

    def show(self, kind, text, token):
        # A typed prompt is on the screen already. Repainting it would take a guess at how the terminal has
        # wrapped and scrolled it, so its colours wait for /tokens and /save.
        if self.terminal and not (self.typing and kind == 'prompt'):
            self.painter.write(text, token and token.share)
        elif not self.terminal and not self.as_json and kind == 'reply':
            print(text, end='', flush=True)

    def remark(self, text):
        text = printable(text)
        if not self.terminal:
            print(text, file=sys.stderr, flush=True)
        else:
            print(render.DIM + text + render.RESET if self.palette.colored else text, flush=True)

    def legend(self):
        if self.palette.colored and self.conversation.sparse:
            for piece in self.palette.legend():
                self.painter.write(*piece)
            self.painter.end_line()

    def run(self, speak):
        """Shows a turn as it comes, and then a line about it. speak(show) -> the turn, which is returned."""
        try:
            turn = speak(self.show)
        finally:
            self.painter.end_line()
        if self.as_json:
            print(render.as_json(turn), flush=True)
        elif not self.terminal and not turn.text.endswith('\n'):
            print(flush=True)
        size = self.conversation.model.config.block_size
        if len(turn.new) > size:
            self.remark(f'the prompt has {len(turn.new)} tokens, of which the model saw the last {size}')
        self.remark(render.summary(turn))
        if self.typing and turn.ended == 'length':
            self.remark('stopped at max_tokens: Enter alone lets it go on')
        return turn

    def answer(self, prompts):
        """Replies to each prompt on its own; returns the exit code."""
        turn = None
        for prompt in filter(str.strip, prompts):
            self.conversation.reset()
            turn = self.run(lambda show: self.conversation.say(prompt, show))
            if turn.ended == 'interrupt':
                return 130
        self.legend()
        return 0 if turn else fail('the prompt is empty')

    def converse(self):
        """Reads lines until Ctrl-D or /quit; returns the exit code."""
        if readline:
            readline.parse_and_bind('set enable-bracketed-paste on')        # pasted lines make one prompt
        if not self.conversation.has_template and not self.conversation.config.turn_template:
            self.remark('This model has no chat template: it does not answer, it continues what you type.')
        self.remark('/help lists the commands; Ctrl-C stops a reply; Ctrl-D leaves.')
        self.legend()
        self.typing = True
        while True:
            try:
                line = input('> ')
                while line.endswith('\\'):
                    line = line[:-1] + '\n' + input('. ')
                if line.startswith('/'):
                    self.command(*line[1:].partition(' ')[::2])
                elif line or self.conversation.can_go_on:
                    self.run(lambda show: self.conversation.say(line, show))
            except EOFError:
                print()
                return 0
            except KeyboardInterrupt:
                print()
                self.remark('Ctrl-D leaves')

    def command(self, name, rest):
        if name not in COMMANDS:
            self.remark(f'no command /{name}; /help lists them')
        elif name in NEED_A_REPLY and not (self.conversation.turns and self.conversation.turns[-1].reply):
            self.remark(f'/{name} needs a reply first')
        else:
            getattr(self, f'command_{name}')(rest.strip())

    def command_help(self, _):
        for name, text in COMMANDS.items():
            print(f'  /{name:<8}{text}')
        print('Enter alone lets the model go on. A line that ends in \\ continues on the next.')
        self.legend()

    def command_reset(self, _):
        self.conversation.reset()

    def command_retry(self, _):
        self.run(self.conversation.retry)

    def command_set(self, rest):
        conversation, (key, _, value) = self.conversation, rest.partition(' ')
        if not rest:
            print(*(f'  {key:<16}{getattr(conversation.config, key)!r}' for key in SETTABLE), sep='\n')
            return
        try:
            if key not in SETTABLE:
                raise ValueError(f'cannot be set; these can: {", ".join(SETTABLE)}')
            value = read_value(next(f for f in fields(ChatConfig) if f.name == key), value)
            conversation.config = replace(conversation.config, **{key: value})
            if key == 'seed':
                conversation.generator.manual_seed(value)
        except ValueError as error:
            self.remark(f'{key} {str(error).removeprefix(key).strip()}')

    def command_dense(self, _):
        if not self.conversation.sparse:
            self.remark('this model is dense: the reply above used every weight')
            return
        if not self.conversation.base:
            self.remark('trained to skip weights: with all of them, this model is often worse')
        sparse, dense = self.conversation.turns[-1], self.run(self.conversation.dense)
        pairs = list(zip(sparse.reply, dense.reply))
        i = next((i for i, (a, b) in enumerate(pairs) if a.id != b.id), None)
        if i is not None:
            a, b = (render.quoted(token.piece) for token in pairs[i])
            self.remark(f'they differ from token {i + 1} on: {a} (sparse), {b} (dense)')
        else:
            self.remark(f'the same {len(pairs)} tokens as with {100 * sparse.share:.1f}% of the weights')
        if sparse.speed and dense.speed:
            self.remark(f'{sparse.speed:.0f} tokens/s with {100 * sparse.share:.1f}% of the weights, '
                        f'{dense.speed:.0f} dense: {sparse.speed / dense.speed:.2f} times as fast')

    def command_layers(self, _):
        print(render.layer_map(self.conversation.turns[-1], self.palette.colored))

    def command_tokens(self, _):
        turn = self.conversation.turns[-1]
        for kind, text, token in turn.shown:
            if kind == 'prompt':
                self.painter.write(text, token and token.share)
        self.painter.end_line()
        print(render.token_table(turn, self.palette))

    def command_save(self, path):
        self.write({'.html': render.save_page, '.png': render.save_picture}, self.conversation.turns, path)

    def command_plot(self, path):
        self.write({'.png': render.plot_reply}, self.conversation.turns[-1], path)

    def write(self, writers, what, path):
        """Writes a turn or turns to a file; its suffix chooses the writer."""
        path = os.path.expanduser(path)
        writer = writers.get(os.path.splitext(path)[1])
        if not writer:
            self.remark(f'say where: FILE{" or FILE".join(writers)}')
            return
        try:
            writer(what, self.palette, path)
            self.remark(f'wrote {path}')
        except OSError as error:
            self.remark(f'{path}: {error.strerror}')

    def command_quit(self, _):
        raise EOFError


# -----------------------------------------------------------------------------


def load(config):
    """-> a conversation with the chosen model, the model's name, and its checkpoint's metadata"""
    os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')     # torch's idle threads sleep, as in train.py
    # torch takes a second to import: --help and bad options need not wait for it
    import torch

    from checkpoint import CheckpointError
    from conversation import Conversation
    from tokenizer import TokenizerError
    from weights import load
    path = config.ckpt or next((path for path in OWN if os.path.exists(path)), ADAPTER)
    name = 'SmolLM2-135M-Instruct (Apache-2.0)' if path == ADAPTER else path
    try:
        model, saved = load(path)
        base = saved.get('base')
        if config.dense and base:
            model, name = load(base)[0], f'{base}, the base of {path}'
        conversation = Conversation(model, saved.get('tokenizer'), config, base)
    except (CheckpointError, TokenizerError, MemoryError) as error:
        fail(error, 1)
    if not conversation.no_kernel:
        torch.set_num_threads(1)        # torch only samples here; more threads would slow the kernel down
    return conversation, f'{name}, {"sparse" if conversation.sparse else "dense"}', saved


def main():
    config, _ = parse_options(ChatConfig, 'python chat.py')
    sys.stdin.reconfigure(encoding='utf-8-sig', errors='replace')       # -sig: without a byte order mark
    sys.stdout.reconfigure(encoding='utf-8', errors='replace')
    conversation, name, saved = load(config)

    terminal = sys.stdout.isatty() and not config.json
    colored = terminal and not os.environ.get('NO_COLOR') and os.environ.get('TERM', 'dumb') != 'dumb'
    # nine tenths of the validation tokens (of a chat model's replies) lie between the ends of the scale
    ends = saved.get('compute_percentiles', {'5': 0.0, '95': 1.0})
    chat = Chat(conversation, render.Palette(ends['5'], ends['95'], colored), terminal, config.json)
    size = sum(p.numel() for key, p in conversation.model.named_parameters() if not key.endswith('theta'))
    chat.remark(f'{name}: {size / 1e6:.1f}M parameters; {conversation.engine}')
    if conversation.no_kernel:
        chat.remark(f'slow: masks weights but saves no time, as {conversation.no_kernel}')
    if config.prompt is not None:
        return chat.answer([config.prompt])
    if terminal and sys.stdin.isatty():
        return chat.converse()
    return chat.answer(line.rstrip('\r\n') for line in sys.stdin)


if __name__ == '__main__':
    try:
        code = main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        code = 130
    except OSError as error:
        # the rest of the output, also that of Python at exit, goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            fail(error.strerror, 1)
        code = 141
    sys.exit(code)
