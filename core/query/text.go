package query

import (
	"regexp"
	"regexp/syntax"
	"unicode"
	"unicode/utf16"
	"unicode/utf8"
)

// maxRegexp bounds the instructions of all the regular expressions of a query.
// The time of a match is their product with the length of the text.
const maxRegexp = 1000

// compileRegexp compiles a regular expression of at most budget instructions and
// returns how many it has.
func compileRegexp(pattern string, budget int) (*regexp.Regexp, int, *Error) {
	// Repetitions multiply the instructions, so they are counted before the program
	// is built.
	parsed, err := syntax.Parse(pattern, syntax.Perl)
	if err != nil {
		return nil, 0, errRegexp
	}
	size := instructions(parsed)
	if size > budget {
		return nil, 0, errRegexpSize
	}
	re, err := regexp.Compile(pattern)
	if err != nil {
		return nil, 0, errRegexp
	}
	return re, size, nil
}

// instructions estimates the size of the program of a regular expression. It stops
// counting beyond any budget.
func instructions(re *syntax.Regexp) int {
	n := 0
	for _, sub := range re.Sub {
		n += instructions(sub)
	}
	switch re.Op {
	case syntax.OpLiteral:
		n = len(re.Rune)
	case syntax.OpCharClass:
		n = 1 + len(re.Rune)/64
	case syntax.OpRepeat:
		n *= max(re.Min, re.Max, 1)
	default:
		n += 2 // a group or an alternative; others need less
	}
	return min(n, 1<<20)
}

// The tokens of a like pattern beside UTF-16 code units.
const (
	likeAny uint32 = 1 << 16 << iota // %: any run
	likeOne                          // _: one code unit
)

// compileLike makes a pattern ready for like. There is no escape character.
func compileLike(pattern []byte) []uint32 {
	var tokens []uint32
	for _, u := range appendFolded(nil, pattern) {
		switch {
		case u == '_':
			tokens = append(tokens, likeOne)
		case u != '%':
			tokens = append(tokens, uint32(u))
		case len(tokens) == 0 || tokens[len(tokens)-1] != likeAny:
			tokens = append(tokens, likeAny)
		}
	}
	return tokens
}

// like reports whether all of a text matches a pattern, without regard to case.
// Neither % nor _ matches a line break (PROTOCOL 13.1). It takes at most the product
// of both lengths.
func like(tokens []uint32, s []byte) bool {
	var buf [256]uint16
	text := appendFolded(buf[:0], s)
	// A run takes as little as it can. If the rest fails, only the last run has to
	// grow: growing an earlier one leaves less text for the same tokens.
	p, t, run, taken := 0, 0, -1, 0
	for t < len(text) {
		switch {
		case p < len(tokens) && tokens[p] == likeAny:
			run, taken = p, t
			p++
		case p < len(tokens) && (tokens[p] == uint32(text[t]) || tokens[p] == likeOne && !lineBreak(text[t])):
			p++
			t++
		case run >= 0 && !lineBreak(text[taken]):
			taken++
			p, t = run+1, taken
		default:
			return false
		}
	}
	for p < len(tokens) && tokens[p] == likeAny {
		p++
	}
	return p == len(tokens)
}

// lineBreak reports whether JavaScript takes a code unit for a line terminator.
func lineBreak(u uint16) bool { return u == '\n' || u == '\r' || u == 0x2028 || u == 0x2029 }

// appendFolded appends the UTF-16 code units of a text, in upper case as far as
// JavaScript's ignoreCase goes: one unit to one unit, and none into ASCII from
// outside.
func appendFolded(dst []uint16, s []byte) []uint16 {
	for len(s) > 0 {
		if c := s[0]; c < utf8.RuneSelf {
			if 'a' <= c && c <= 'z' {
				c -= 'a' - 'A'
			}
			dst = append(dst, uint16(c))
			s = s[1:]
			continue
		}
		r, n := utf8.DecodeRune(s)
		if r == utf8.RuneError && n == 1 && len(s) >= 3 && s[0] == 0xed && s[1] >= 0xa0 && s[1] <= 0xbf && s[2]&0xc0 == 0x80 {
			// An unpaired surrogate, as JavaScript strings may hold and encoders write.
			dst = append(dst, 0xd000|uint16(s[1]&0x3f)<<6|uint16(s[2]&0x3f))
			s = s[3:]
			continue
		}
		s = s[n:]
		if r > 0xffff {
			dst = utf16.AppendRune(dst, r)
			continue
		}
		if up := unicode.ToUpper(r); up >= utf8.RuneSelf && up <= 0xffff {
			r = up
		}
		dst = append(dst, uint16(r))
	}
	return dst
}

// appendLower appends a text in lower case.
func appendLower(dst, s []byte) []byte {
	for len(s) > 0 {
		if c := s[0]; c < utf8.RuneSelf {
			if 'A' <= c && c <= 'Z' {
				c += 'a' - 'A'
			}
			dst = append(dst, c)
			s = s[1:]
			continue
		}
		r, n := utf8.DecodeRune(s)
		if r == utf8.RuneError && n == 1 {
			dst = append(dst, s[0])
		} else {
			dst = utf8.AppendRune(dst, unicode.ToLower(r))
		}
		s = s[n:]
	}
	return dst
}
