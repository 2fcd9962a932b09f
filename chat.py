"""
Talk to a CWIC model and see where its compute goes, while it happens.

    python chat.py                                      # a conversation; /help lists the commands
    python chat.py --prompt "def fibonacci(n):"         # one reply
    python chat.py --json < prompts.txt                 # one reply to each line, as JSON, for scripts

Each token stands on the colour of the compute that predicted it: the pass over the token before it, counted in that same
pass, never in a second one. The first token of all was predicted by nothing and has no colour. Where stdout is not a
terminal it gets the continuations and nothing else; what there is to say about them goes to stderr.

Models trained on plain text continue it: what is typed is added to the text so far, on a new line. For models trained on
dialogues give --turn-template 'User: {prompt}\\nAssistant:' --stop '\\nUser:'.

Exit codes: 0; 1 no usable model; 2 a bad option or prompt; 130 interrupted; 141 stdout was closed.

What is said is conversation.py's, how it looks render.py's, and this file is the program: options, terminal, pipes.

But: no mouse, no full screen, no choosing among models while it runs.
"""

import signal

if __name__ == '__main__':
    signal.signal(signal.SIGINT, signal.SIG_DFL)        # Ctrl-C in the seconds that torch takes to import just ends

import difflib
import os
import sys
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace

import numpy as np

import render
from conversation import Conversation
from cwic import CheckpointError, load_checkpoint
from options import fail, option, parse_options
from tokenizer import TokenizerError, load_tokenizer

try:
    import readline
except ImportError:     # Windows has none: typing works, without editing
    readline = None

CHECKPOINTS = ('out/best.pt', 'out/last.pt')       # the first that exists
NEED_A_REPLY = ('retry', 'dense', 'layers', 'tokens', 'save', 'plot')
SETTABLE = ('temperature', 'top_k', 'top_p', 'seed', 'max_tokens', 'stop', 'turn_template')


@dataclass
class ChatConfig:
    """Continues text with a CWIC model, each token on the colour of its compute."""
    prompt: str = option(None, 'reply to this and end; without it, converse, or reply to each line of a redirected stdin')
    ckpt: str = option(None, f'checkpoint; without it, the first there is of {", ".join(CHECKPOINTS)}')
    json: bool = option(False, 'print one JSON object for each reply')
    dtype: str = option('f32', 'of the weights in the kernel: f32, bf16 or int8')
    threads: int = option(None, 'of the kernel; without it, one for each core, up to 8')
    color: str = option('auto', 'truecolor, 256, none, or auto: what the terminal says it can')
    no_color: bool = option(False, 'the same as --color none')
    temperature: float = option(0.7, 'of sampling; 0 always takes the likeliest token')
    top_k: int = option(0, 'sample among this many of the likeliest tokens; 0: all')
    top_p: float = option(0.95, 'sample among the likeliest tokens that make up this much probability')
    seed: int = option(1, 'of sampling: same seed, same text')
    max_tokens: int = option(200, 'longest reply')
    stop: str = option('', 'text that ends a reply, itself not shown; several: separated by |; \\n and \\t are understood')
    turn_template: str = option('', 'what a turn is made of, with {prompt} for what is typed; \\n and \\t are understood')

    def problem(self):
        """What is wrong with the values, in one line; None where nothing is."""
        for name, right, needed in (
                ('temperature', self.temperature >= 0, 'at least 0'), ('top_k', self.top_k >= 0, 'at least 0'),
                ('top_p', 0 < self.top_p <= 1, 'above 0 and up to 1'), ('seed', self.seed >= 0, 'at least 0'),
                ('max_tokens', self.max_tokens >= 1, 'at least 1'),
                ('turn_template', not self.turn_template or '{prompt}' in self.turn_template, 'empty, or hold {prompt}'),
                ('color', self.color in ('auto', 'truecolor', '256', 'none'), 'auto, truecolor, 256 or none')):
            if not right:
                return f'{name} must be {needed}, not {getattr(self, name)}'
        return None


# -----------------------------------------------------------------------------
# the terminal


@contextmanager
def interruptible():
    """Gives a function that tells whether Ctrl-C was pressed; a second one raises KeyboardInterrupt as usual."""
    pressed = []

    def note(*_):
        if pressed:
            raise KeyboardInterrupt
        pressed.append(True)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)


def too_long(turn, conversation):
    """What to say of a prompt that does not fit the context; None where it fits."""
    size = conversation.model.config.block_size
    return f'the prompt has {len(turn.prompt)} tokens, of which the model saw the last {size}' if len(turn.prompt) > size else None


class Chat:
    """A conversation typed at a terminal. A line that begins with / is a command: the methods named command_... ."""

    def __init__(self, conversation, palette):
        self.conversation, self.palette = conversation, palette
        self.painter = render.Painter(sys.stdout, palette, lambda: os.get_terminal_size(sys.stdout.fileno()).columns or 80)
        self.leaving = self.warned = False      # warned: the last thing pressed was a Ctrl-C
        self.commands = {name[8:]: getattr(self, name) for name in dir(self) if name.startswith('command_')}

    def show(self, kind, text, token):
        self.painter.write(text, token.share)

    def quiet(self, text):
        print(text if self.palette.mode == 'none' else render.DIM + text + render.RESET, flush=True)

    def legend(self):
        if self.palette.mode != 'none':
            print(self.palette.legend())

    def run(self, speak, legend=False):
        """speak(show, interrupted) -> a turn, which is shown as it comes, with a line about it after it."""
        with interruptible() as interrupted:
            try:
                turn = speak(self.show, interrupted)
            finally:
                self.painter.end_line()
        if too_long(turn, self.conversation):
            self.quiet(too_long(turn, self.conversation))
        self.warned = turn.ended == 'interrupt'
        if legend:
            self.legend()
        self.quiet(turn.summary())
        return turn

    def one(self, prompt):
        """Replies to one prompt."""
        turn = self.run(lambda *how: self.conversation.say(prompt, *how), legend=True)
        return 130 if turn.ended == 'interrupt' else 0

    def converse(self):
        """Reads lines until Ctrl-D, /quit, or Ctrl-C twice in a row."""
        if readline:
            readline.set_completer_delims(' ')
            readline.set_completer(self.complete)
            readline.parse_and_bind('bind ^I rl_complete' if 'libedit' in (readline.__doc__ or '') else 'tab: complete')
        if not self.conversation.config.turn_template:
            self.quiet('No --turn-template: the model does not answer, it continues what you type.')
        self.quiet('/help lists the commands; Ctrl-C stops a reply; Ctrl-D leaves.')
        self.legend()
        while not self.leaving:
            try:
                line = input('> ')
                while line.endswith('\\'):
                    line = line[:-1] + '\n' + input('. ')
            except EOFError:
                print()
                return 0
            except KeyboardInterrupt:
                print()
                if self.warned:
                    return 130
                self.warned = True
                self.quiet('Ctrl-C once more, or Ctrl-D, leaves')
                continue
            self.warned = False
            if line.startswith('/'):
                self.command(line)
            elif line or self.conversation.tokens:
                self.run(lambda *how: self.conversation.say(line, *how))
            else:
                self.quiet('nothing to go on from: type the beginning of a text')
        return 0

    def command(self, line):
        name, _, rest = line[1:].partition(' ')
        if name not in self.commands:
            near = difflib.get_close_matches(name, self.commands, n=1)
            self.quiet(f'unknown command /{name}' + (f'; did you mean /{near[0]}?' if near else '; /help lists them'))
        elif name in NEED_A_REPLY and not (self.conversation.turns and self.conversation.turns[-1].reply):
            self.quiet(f'/{name} needs a reply first')
        else:
            self.commands[name](rest.strip())

    def complete(self, text, state):
        """readline's completer: commands, then the keys of /set."""
        line = readline.get_line_buffer()
        if line.startswith('/set '):
            words = [key + ' ' for key in SETTABLE] if line.count(' ') == 1 else []
        else:
            words = ['/' + name + ' ' for name in self.commands] if line.startswith('/') and ' ' not in line else []
        return ([word for word in words if word.startswith(text)] + [None])[state]

    # each command's docstring is its line in /help

    def command_help(self, _):
        """this list"""
        width = max(map(len, self.commands)) + 2
        for name, method in self.commands.items():
            print(f'  /{name:<{width}}{method.__doc__}')
        print('Enter alone lets the model go on. A line that ends in \\ goes on in the next one.')
        self.legend()

    def command_reset(self, _):
        """forget the conversation; the random numbers start again too"""
        self.conversation.reset()

    def command_retry(self, _):
        """another reply to the last prompt"""
        self.run(self.conversation.retry)

    def command_set(self, rest):
        """/set KEY VALUE changes an option from here on; alone, lists them"""
        config = self.conversation.config
        key, _, value = rest.partition(' ')
        if not rest:
            for key in SETTABLE:
                print(f'  {key:<14}{getattr(config, key)!r}')
            return
        if key not in SETTABLE:
            self.quiet(f'unknown option {key}; there are {", ".join(SETTABLE)}')
            return
        kind = next(f.type for f in fields(ChatConfig) if f.name == key)
        try:
            changed = replace(config, **{key: kind(value)})
        except ValueError:
            self.quiet(f'{key} needs {"a whole number" if kind is int else "a number"}, not {value!r}')
            return
        if changed.problem():
            self.quiet(changed.problem())
            return
        self.conversation.config = changed
        if key == 'seed':
            self.conversation.rng = np.random.default_rng(changed.seed)

    def command_dense(self, _):
        """the last prompt with every weight: both speeds, and where the texts part"""
        sparse = self.conversation.turns[-1]
        dense = self.run(self.conversation.dense)
        same = next((i for i, (a, b) in enumerate(zip(sparse.reply, dense.reply)) if a.id != b.id), None)
        if same is None:
            count = min(len(sparse.reply), len(dense.reply))
            self.quiet(f'the same {count} tokens as with {100 * sparse.share():.1f}% of the weights')
        else:
            a, b = (render.quoted(turn.reply[same].piece, 20).rstrip() for turn in (sparse, dense))
            self.quiet(f'they part at token {same + 1}: {a} (sparse), {b} (dense)')
        if sparse.speed() and dense.speed():
            self.quiet(f'sparse {sparse.speed():.0f} tokens/s, dense {dense.speed():.0f}: '
                       f'{sparse.speed() / dense.speed():.2f} times as fast at reduction {1 / sparse.share():.2f}')

    def command_layers(self, _):
        """which matrices the last reply used, and how much of them"""
        print('\n'.join(render.layer_map(self.conversation.turns[-1], self.palette.mode)))

    def command_tokens(self, _):
        """the last reply as a table"""
        print('\n'.join(render.token_table(self.conversation.turns[-1], self.palette)))

    def command_save(self, path):
        """/save FILE.html writes the conversation as a page"""
        self.write(path, '.html', lambda: render.save_page(self.conversation.turns, self.palette, path))

    def command_plot(self, path):
        """/plot FILE.png draws the compute of the last reply"""
        self.write(path, '.png', lambda: render.plot(self.conversation.turns[-1], self.palette, path))

    def write(self, path, ending, writer):
        if not path.endswith(ending):
            self.quiet(f'say where: a file name that ends in {ending}')
            return
        try:
            writer()
            self.quiet(f'wrote {path}')
        except OSError as error:
            self.quiet(f'{path}: {error.strerror}')

    def command_quit(self, _):
        """leave; so does Ctrl-D"""
        self.leaving = True


# -----------------------------------------------------------------------------


def answer(conversation, prompts, chat, as_json):
    """
    Replies to each prompt on its own; returns the exit code. chat: shows them on a terminal; None: stdout gets
    the continuations, or JSON, and nothing else.
    """
    def show(kind, text, token):
        if kind == 'reply' and not as_json:
            print(text, end='', flush=True)

    code = None
    for prompt in prompts:
        conversation.reset()
        if chat:
            code = chat.one(prompt)
        else:
            with interruptible() as interrupted:
                turn = conversation.say(prompt, show, interrupted)
            if as_json:
                print(turn.to_json(conversation.decoder.names), flush=True)
            elif not turn.text.endswith('\n'):
                print(flush=True)
            print(*filter(None, (too_long(turn, conversation), turn.summary())), sep='\n', file=sys.stderr)
            code = 130 if turn.ended == 'interrupt' else 0
        if code:
            return code
    return fail('no prompt: nothing but blank lines on stdin') if code is None else code


def scale_ends(saved):
    """Shares of dense for the ends of the colour scale: nine tenths of the validation tokens lie between them."""
    percentiles = saved.get('compute_percentiles') or {}
    low, high = percentiles.get('5', 0.0), percentiles.get('95', 0.0)
    return (low, high) if high - low > 1e-3 else (0.0, 1.0)


def header(path, conversation, saved):
    """The first line: which model this is."""
    size = sum(p.numel() for name, p in conversation.model.named_parameters() if not name.endswith('theta'))
    facts = [f'{size / 1e6:.1f}M parameters']
    facts += [f'loss {saved["val_loss"]:.2f}'] if saved.get('val_loss') is not None else []
    facts += [f'reduction {saved["reduction"]:.2f}'] if saved.get('reduction') is not None else []
    return f'{path}: {", ".join(facts)}; {conversation.engine}'


def main():
    config = parse_options(ChatConfig, 'python chat.py')
    if config.problem():
        fail('--' + config.problem())
    if config.prompt == '':
        fail('--prompt is empty: give it some text to go on from')
    path = config.ckpt or next((path for path in CHECKPOINTS if os.path.exists(path)), None)
    if path is None:
        fail('there is no trained model yet: make one with: python train.py', 1)
    try:
        model, saved = load_checkpoint(path)
        encoding = load_tokenizer(saved.get('tokenizer'))
        conversation = Conversation(model, encoding, config)
    except (CheckpointError, TokenizerError) as error:
        fail(str(error), 1)
    except ValueError as error:         # a dtype or a number of threads that cannot be
        fail(str(error))
    if encoding.n_vocab > model.config.vocab_size:
        fail(f'{path}: its tokenizer has {encoding.n_vocab} ids, its model knows {model.config.vocab_size}: use another checkpoint', 1)

    sys.stdin.reconfigure(encoding='utf-8', errors='replace')
    sys.stdout.reconfigure(errors='replace', **({} if sys.stdout.isatty() else {'encoding': 'utf-8'}))
    print(header(path, conversation, saved), file=sys.stderr)
    if conversation.no_kernel:
        print(f'decoding in PyTorch, which is slower and skips nothing for real: {conversation.no_kernel}', file=sys.stderr)
    low, high = scale_ends(saved)
    if (low, high) == (0.0, 1.0):
        print('no spread of compute in the checkpoint: colours go from 0 to 100% of dense', file=sys.stderr)

    terminal = sys.stdout.isatty() and not config.json
    mode = 'none' if config.no_color else render.color_mode(sys.stdout, os.environ) if config.color == 'auto' else config.color
    chat = Chat(conversation, render.Palette(mode, low, high)) if terminal else None
    if config.prompt is not None:
        return answer(conversation, [config.prompt], chat, config.json)
    if terminal and sys.stdin.isatty():
        return chat.converse()
    return answer(conversation, (line.rstrip('\n') for line in sys.stdin if line.strip()), chat, config.json)


if __name__ == '__main__':
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        code = main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:
        # whatever is still to be written, at exit too, goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    sys.exit(code)
