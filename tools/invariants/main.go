// Command invariants holds INVARIANTS.md, and the guarantees in README.md, against
// the repository: every test that they cite must exist, every file that an entry
// names must exist, and the number of entries without a test (NAKED) must not
// exceed the number in the head of INVARIANTS.md.
//
// It does not run the tests: `make test` does, and a test that is there fails
// there.
package main

import (
	"errors"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
)

func main() {
	report, err := run(os.DirFS("."))
	if err != nil {
		fmt.Fprintln(os.Stderr, "invariants:", err)
		os.Exit(1)
	}
	fmt.Println("invariants:", report)
}

// run checks the repository at root and says what it found.
func run(root fs.FS) (string, error) {
	text, err := fs.ReadFile(root, "INVARIANTS.md")
	if err != nil {
		return "", fmt.Errorf("read the catalogue (run it at the root of the repository): %w", err)
	}
	catalogue, err := parse(string(text))
	if err != nil {
		return "", err
	}
	tests, err := testsIn(root)
	if err != nil {
		return "", err
	}
	exists := func(path string) bool {
		_, err := fs.Stat(root, path)
		return err == nil
	}
	summary, err := catalogue.check(tests, exists)
	return summary, errors.Join(err, checkReadme(root, tests))
}

// checkReadme fails when the guarantees in README.md cite a test that is not there.
func checkReadme(root fs.FS, tests map[string]bool) error {
	text, err := fs.ReadFile(root, "README.md")
	if err != nil {
		return fmt.Errorf("read the guarantees: %w", err)
	}
	var wrong []error
	for _, m := range regexp.MustCompile("`((?:Test|Fuzz)\\w+)").FindAllStringSubmatch(string(text), -1) {
		if !tests[m[1]] {
			wrong = append(wrong, fmt.Errorf("README.md cites %s, which is not a test of this repository", m[1]))
		}
	}
	return errors.Join(wrong...)
}

// Status of an entry.
const (
	held  = "held"  // a test fails when the maintaining code is broken
	naked = "NAKED" // the code maintains it, no test would notice otherwise
	later = "later" // what it is about is not built
)

type entry struct {
	id     string
	paths  []string // of the maintaining code
	tests  []string
	status string
}

type catalogue struct {
	allowedNaked int
	entries      []entry
}

// parse reads the head's allowance and the rows of the tables:
// | id | statement | code | tests | status |.
func parse(text string) (catalogue, error) {
	allowance := regexp.MustCompile(`(?m)^NAKED entries allowed: (\d+)$`).FindStringSubmatch(text)
	if allowance == nil {
		return catalogue{}, errors.New(`INVARIANTS.md has no line "NAKED entries allowed: <number>"`)
	}
	n, err := strconv.Atoi(allowance[1])
	if err != nil {
		return catalogue{}, fmt.Errorf("read the allowance of NAKED entries: %w", err)
	}
	c := catalogue{allowedNaked: n}
	id := regexp.MustCompile(`^[A-Z]+-\d+$`)
	code := regexp.MustCompile("`([^`]+)`")
	inCode := func(cell string) []string {
		var words []string
		for _, m := range code.FindAllStringSubmatch(cell, -1) {
			words = append(words, m[1])
		}
		return words
	}
	for line := range strings.Lines(text) {
		cells := strings.Split(strings.Trim(strings.TrimSpace(line), "|"), "|")
		for i := range cells {
			cells[i] = strings.TrimSpace(cells[i])
		}
		if !id.MatchString(cells[0]) {
			continue
		}
		if len(cells) != 5 {
			return catalogue{}, fmt.Errorf("%s has %d cells; want id, statement, code, tests, status", cells[0], len(cells))
		}
		c.entries = append(c.entries, entry{
			id: cells[0], paths: inCode(cells[2]), tests: inCode(cells[3]), status: cells[4],
		})
	}
	if len(c.entries) == 0 {
		return catalogue{}, errors.New("INVARIANTS.md has no entries")
	}
	return c, nil
}

// testsIn returns the names of all tests and fuzz tests below root.
func testsIn(root fs.FS) (map[string]bool, error) {
	tests := map[string]bool{}
	err := fs.WalkDir(root, ".", func(path string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.IsDir() && path != "." && (strings.HasPrefix(d.Name(), ".") || d.Name() == "node_modules"):
			return fs.SkipDir
		case !strings.HasSuffix(path, "_test.go"):
			return nil
		}
		src, err := fs.ReadFile(root, path)
		if err != nil {
			return fmt.Errorf("read a test file: %w", err)
		}
		f, err := parser.ParseFile(token.NewFileSet(), filepath.Base(path), src, parser.SkipObjectResolution)
		if err != nil {
			return fmt.Errorf("parse %s: %w", path, err)
		}
		for _, decl := range f.Decls {
			if fn, ok := decl.(*ast.FuncDecl); ok && fn.Recv == nil &&
				(strings.HasPrefix(fn.Name.Name, "Test") || strings.HasPrefix(fn.Name.Name, "Fuzz")) {
				tests[fn.Name.Name] = true
			}
		}
		return nil
	})
	return tests, err
}

// check returns a summary, or an error that lists all that is wrong.
func (c catalogue) check(tests map[string]bool, exists func(path string) bool) (string, error) {
	var wrong []error
	bad := func(format string, args ...any) { wrong = append(wrong, fmt.Errorf(format, args...)) }
	count := map[string]int{}
	seen := map[string]bool{}
	for _, e := range c.entries {
		if seen[e.id] {
			bad("%s stands there twice", e.id)
		}
		seen[e.id] = true
		count[e.status]++
		for _, test := range e.tests {
			// A subtest is cited as TestName/subtest; its name may be made at run time.
			if name, _, _ := strings.Cut(test, "/"); !tests[name] {
				bad("%s cites %s, which is not a test of this repository", e.id, name)
			}
		}
		for _, path := range e.paths {
			if !exists(path) {
				bad("%s names %s, which is not there", e.id, path)
			}
		}
		switch {
		case e.status != held && e.status != naked && e.status != later:
			bad("%s has the status %q; want %s, %s or %s", e.id, e.status, held, naked, later)
		case e.status == held && len(e.tests) == 0:
			bad("%s is said to be held and cites no test; mark it %s", e.id, naked)
		case e.status == held && len(e.paths) == 0:
			bad("%s is said to be held and names no code", e.id)
		}
	}
	if count[naked] > c.allowedNaked {
		bad("%d entries are NAKED, %d are allowed: write the test", count[naked], c.allowedNaked)
	}
	summary := fmt.Sprintf("%d held, %d NAKED (allowed %d), %d later", count[held], count[naked], c.allowedNaked, count[later])
	return summary, errors.Join(wrong...)
}
