// Command depcheck fails when a file of the workspace imports what the house
// rules forbid. The rules, and why each is there, stand in rules.go. It looks at
// files and not at packages, because a few rules name the file that may do it.
//
// It does not look at what a dependency imports in turn.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"go/parser"
	"go/token"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// module is the prefix of all our modules.
const module = "github.com/topgun-sync/topgun/"

func main() {
	files, err := load(context.Background())
	if err != nil {
		fmt.Fprintln(os.Stderr, "depcheck:", err)
		os.Exit(2)
	}
	violations := check(files)
	for _, v := range violations {
		fmt.Fprintln(os.Stderr, v)
	}
	if len(violations) > 0 {
		fmt.Fprintf(os.Stderr, "depcheck: %d forbidden imports\n", len(violations))
		os.Exit(1)
	}
	fmt.Printf("depcheck: %d files keep the import rules\n", len(files))
}

// file is one Go file and what it imports.
type file struct {
	pkg     string   // import path of its package, without the module prefix for ours
	name    string   // base name
	test    bool     // whether only tests compile it
	imports []string // import paths, without the module prefix for ours
}

// listed is a package as `go list -json` prints it.
type listed struct {
	Dir          string   `json:"Dir"`
	ImportPath   string   `json:"ImportPath"`
	GoFiles      []string `json:"GoFiles"`
	CgoFiles     []string `json:"CgoFiles"`
	TestGoFiles  []string `json:"TestGoFiles"`
	XTestGoFiles []string `json:"XTestGoFiles"`
}

// load reads the files of all packages of the workspace.
func load(ctx context.Context) ([]file, error) {
	// -e: a package that does not compile is the compiler's business.
	cmd := exec.CommandContext(ctx, "go", "list", "-e", "-json=Dir,ImportPath,GoFiles,CgoFiles,TestGoFiles,XTestGoFiles", "work")
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("list the packages: %w", err)
	}
	var files []file
	for dec := json.NewDecoder(strings.NewReader(string(out))); ; {
		var p listed
		err := dec.Decode(&p)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return nil, fmt.Errorf("read the list of packages: %w", err)
		}
		for i, name := range slices.Concat(p.GoFiles, p.CgoFiles, p.TestGoFiles, p.XTestGoFiles) {
			imports, err := importsOf(filepath.Join(p.Dir, name))
			if err != nil {
				return nil, err
			}
			files = append(files, file{
				pkg:     strings.TrimPrefix(p.ImportPath, module),
				name:    name,
				test:    i >= len(p.GoFiles)+len(p.CgoFiles),
				imports: imports,
			})
		}
	}
	if len(files) == 0 {
		return nil, errors.New("the workspace has no packages; run it inside the repository")
	}
	return files, nil
}

func importsOf(path string) ([]string, error) {
	f, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.ImportsOnly)
	if err != nil {
		return nil, fmt.Errorf("read the imports: %w", err)
	}
	var imports []string
	for _, spec := range f.Imports {
		imp, err := strconv.Unquote(spec.Path.Value)
		if err != nil {
			return nil, fmt.Errorf("read the imports of %s: %w", path, err)
		}
		imports = append(imports, strings.TrimPrefix(imp, module))
	}
	return imports, nil
}

// check returns one line for every forbidden import, sorted.
func check(files []file) []string {
	var violations []string
	for _, f := range files {
		for _, imp := range f.imports {
			if why := forbidden(f, imp); why != "" {
				violations = append(violations, fmt.Sprintf("%s/%s imports %s: %s", f.pkg, f.name, imp, why))
			}
		}
	}
	slices.Sort(violations)
	return violations
}
